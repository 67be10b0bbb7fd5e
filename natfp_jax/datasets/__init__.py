"""TFDS builders of the corpora that come with natfp_jax."""
