"""Long proofs with real processes: each is a program that writes its findings; the tests take their short forms."""
