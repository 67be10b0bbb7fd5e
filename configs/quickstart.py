"""Can two models be told apart when only a seed differs? The answer at toy scale.

    natfp run configs/quickstart.py

Two initialisations x two data orders of a 0.7M-parameter decoder, each trained for one whole epoch (410,000 tokens) on the
documentation of this machine's Python; 2,000 prompts of distinct documents, drawn from every arm after a tenth of training
and at the end, and from one arm twice (the null).

Cost: two to six minutes and 1.6 GB of memory on two CPU cores. What to expect: order recognisable by a bag of subwords in
about 81 of 100 texts early and 57 to 60 at the end; init in 59 to 64 early, fading to 52 to 57; a likelihood ceiling above
96 % at the end; the null at chance. The sizes were chosen on the seeds 0 and 1; these here are others.
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
    factors=(Factor("seeds.init", (11, 12)), Factor("seeds.order", (21, 22))),
    sampling=Sampling(prompts=2000, new_tokens=48, checkpoints=(0.1, 1.0)),
)
