"""Can two models be told apart when only a seed differs? The answer at toy scale.

    natfp run configs/quickstart.py

Two initialisations x two data orders of a 0.7M-parameter decoder, each trained for one whole epoch on docstrings of
this machine.
"""

from natfp_jax.config import Corpus, Data, Experiment, Factor, MachineDocs, Model, Optimiser, Sampling, Study

study = Study(
    name="quickstart",
    experiment=Experiment(
        corpus=Corpus(source=MachineDocs(), vocabulary=2048),
        model=Model(width=128, layers=2, heads=4),
        data=Data(seq_len=64, windows=6400, epochs=1, batch=32),
        optimiser=Optimiser(learning_rate=3e-3),
    ),
    factors=(Factor("seeds.init", (0, 1)), Factor("seeds.order", (0, 1))),
    sampling=Sampling(prompts=2000, new_tokens=48, checkpoints=(0.1, 1.0)),
)
