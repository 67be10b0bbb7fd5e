"""Claim: the initial weights are a strong fingerprint early in training, and fade as the models see the same data.

    natfp run configs/paper/early_weights.py [scale=small]

Inits crossed with orders, read at step 0, early, and to the end: the trajectories of both, and of what a distance of two models
consists of. At the toy's scale the four arms are among those of seeds.py.

Cost of the toy on two CPU cores: 12 minutes, 4 arms. Expected: at step 0 init in the likelihoods alone (ceiling 82 %) and
order exactly at chance; init in 65 of 100 texts after 3 % of training and in 51 in the end, order in 78 after 10 % and in 58
in the end, under ceilings of 96 %.
"""

from scales import EXPERIMENTS, FRACTIONS, RUNS, Scale, attribution, sampling

from natfp_jax.config import Factor, Study


def study(scale: Scale = "toy") -> Study:
    """The study at a scale."""
    levels = (0, 1) if scale == "toy" else (0, 1, 2, 3)
    return Study(
        name=f"paper-early-{scale}",
        experiment=EXPERIMENTS[scale],
        factors=(Factor("seeds.init", levels), Factor("seeds.order", levels)),
        run=RUNS[scale],
        sampling=sampling(scale, FRACTIONS),
        attribution=attribution(scale, "subwords", "ngrams"),
    )
