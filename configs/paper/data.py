"""Claim: models of other training data are recognisable. The positive control of all the others.

    natfp run configs/paper/data.py [scale=small]

The base arm is trained on the first windows of a corpus. One arm differs in which windows of the same corpus, the next ones, of
which it shares none; another in the corpus.

Cost of the toy on two CPU cores: 5 minutes, 3 arms. Expected: the other corpus recognised in 99 of 100 texts, the other
windows in 61 to 63, under ceilings of 100 and 97 %.
"""

from scales import EXPERIMENTS, OTHER_CORPUS, RUNS, Scale, attribution, sampling

from natfp_jax.config import Factor, Study


def study(scale: Scale = "toy") -> Study:
    """The study at a scale."""
    experiment = EXPERIMENTS[scale]
    return Study(
        name=f"paper-data-{scale}",
        experiment=experiment,
        factors=(
            Factor("data.first", (0, experiment.data.windows)),
            Factor("corpus.source", (experiment.corpus.source, OTHER_CORPUS[scale])),
        ),
        design="one_at_a_time",
        run=RUNS[scale],
        sampling=sampling(scale),
        attribution=attribution(scale, "subwords", "ngrams", "lm"),
    )
