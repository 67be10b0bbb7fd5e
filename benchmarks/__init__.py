"""What things cost, beside what users would pick instead. Each module is a program; README.md says how they measure."""
