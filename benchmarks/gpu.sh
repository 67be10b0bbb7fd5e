#!/bin/sh
# Everything that is measured on a GPU, in one call, from the repository's folder:
#
#     benchmarks/gpu.sh [PYTHON]
#
# PYTHON has natfp_jax, jax with CUDA, PyTorch and transformers. Meant for half an hour on one GPU of 80 GB, and not run yet; results/*-cuda.* will hold the figures.
set -eu
python=${1:-python3}
# All sides stay on the card at once, so that they can be timed in turn: nobody takes all of its memory beforehand.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
"$python" -m benchmarks.train_step --device cuda --rounds 7 --save
"$python" -m benchmarks.cohort --device cuda --replicas 32 --rounds 5 --save
"$python" -m benchmarks.sampling --device cuda --rounds 5 --save
