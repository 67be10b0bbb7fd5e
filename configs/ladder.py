"""How much of the likelihood ceiling does each classifier read, and what would more texts bring? The whole ladder on one pair.

    natfp run configs/ladder.py

Two initialisations of a 0.7M-parameter decoder, trained as in the quickstart; 10,000 prompts, several of one document, are
continued by both, and by one of them twice (the null). Counted pieces (subwords, words, runs of up to three subwords), one
language model a source, and a transformer from scratch learn from a fifth and from all of the training and validation texts;
the same test texts judge all of them, and decisions on 1, 4, 16, ... texts of one source. With five times the prompts:

    natfp run configs/ladder.py name=ladder50k sampling.prompts=50000 attribution.learning_curve='[0.04,0.2]'

Cost: 14 minutes of processor time and 1.5 GB of memory on two CPU cores, most of it the language models; with 50,000
prompts about five times as much. What to expect: docs/results/attribution has the tables of one such run.
"""

from natfp_jax.config import Attribution, Corpus, Data, Experiment, Factor, MachineDocs, Model, Optimiser, Sampling, Study

study = Study(
    name="ladder",
    experiment=Experiment(
        corpus=Corpus(source=MachineDocs(), vocabulary=2048, prompt_fraction=0.5),
        model=Model(width=128, layers=2, heads=4),
        data=Data(seq_len=64, windows=6400, epochs=1, batch=32),
        optimiser=Optimiser(learning_rate=3e-3),
    ),
    factors=(Factor("seeds.init", (11, 12)),),
    sampling=Sampling(prompts=10_000, offsets_per_document=20, new_tokens=24),
    attribution=Attribution(
        classifiers=("subwords", "words", "ngrams", "lm", "transformer"),
        learning_curve=(0.2,),
    ),
)
