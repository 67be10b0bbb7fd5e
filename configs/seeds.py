"""How much of a fingerprint is the initialisation, how much the data order? A 4 x 4 grid with its twin, over training.

    natfp run configs/seeds.py --out out

The corpus is wiki40b/en, which TFDS prepares once where there is a network:

    python -c "import tensorflow_datasets as tfds, tensorflow_datasets.text.wiki40b; \
tfds.builder('wiki40b/en').download_and_prepare()"

Your own text instead: experiment.corpus.source='{"kind": "text_folder", "path": "texts"}'.

Seventeen arms of about 34M parameters, 52M tokens each: 6 x parameters x tokens is 1.1e16 FLOPs an arm and 1.8e17 in all, an
hour at a sustained 50 TFLOP/s. Ten thousand prompts at five checkpoints are 900,000 texts of 64 tokens. On two CPU cores it
would take weeks; the same study at the quickstart's size:

    natfp run configs/seeds.py name=seeds-small experiment.corpus.source='{"kind": "machine_docs"}' \
      experiment.corpus.vocabulary=2048 experiment.corpus.prompt_fraction=0.25 experiment.corpus.validation_fraction=0.03 \
      experiment.model='{"width": 128, "layers": 2, "heads": 4}' experiment.optimiser.learning_rate=0.003 \
      experiment.data='{"seq_len": 64, "windows": 6400, "batch": 32}' sampling.prompts=2000 sampling.new_tokens=48

What to expect: at step 0 inits are recognisable and orders, whose weights are still bitwise equal, are not; the null stays at
chance throughout. What the twin does is an open question.
"""

from natfp_jax.config import (
    Attribution,
    Corpus,
    Data,
    Experiment,
    Factor,
    Model,
    Optimiser,
    Perturb,
    Sampling,
    Study,
    Tfds,
)

study = Study(
    name="seeds",
    experiment=Experiment(
        corpus=Corpus(source=Tfds("wiki40b/en"), vocabulary=16_384, validation_fraction=0.002, prompt_fraction=0.01),
        model=Model(width=512, layers=8, heads=8),
        data=Data(seq_len=256, windows=204_800, epochs=1, batch=128),
        optimiser=Optimiser(learning_rate=1e-3),
    ),
    factors=(Factor("seeds.init", (1, 2, 3, 4)), Factor("seeds.order", (1, 2, 3, 4))),
    twin=Perturb(),
    sampling=Sampling(prompts=10_000, new_tokens=64, checkpoints=(0.0, 0.03, 0.1, 0.3, 1.0)),
    attribution=Attribution(permutations=99_999),  # with 530 tests, 9,999 would leave none below .05 after Holm
)
