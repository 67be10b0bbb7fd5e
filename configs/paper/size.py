"""Claim: models of other sizes are recognisable, trained on the same windows in the same order from the same seeds.

    natfp run configs/paper/size.py [scale=small]

Half as wide again, twice as deep, and both. What a wider model's seed draws is not what a narrower one's does; a deeper one
shares its shallow layers' initial weights.

Cost of the toy on two CPU cores: 10 minutes, 4 arms. Expected: width in 53 to 54 of 100 texts, depth in 52, which is not
decided, both in 54 to 56, under ceilings of 96 to 98 %.
"""

from dataclasses import replace

from scales import EXPERIMENTS, RUNS, Scale, attribution, sampling

from natfp_jax.config import Factor, Study


def study(scale: Scale = "toy") -> Study:
    """The study at a scale."""
    experiment = EXPERIMENTS[scale]
    model = experiment.model
    width, layers = model.width * 3 // 2, model.layers * 2
    return Study(
        name=f"paper-size-{scale}",
        experiment=experiment,
        factors=(
            Factor("model.width", (model.width, width)),
            Factor("model.layers", (model.layers, layers)),
            Factor("model", (model, replace(model, width=width, layers=layers))),
        ),
        design="one_at_a_time",
        run=RUNS[scale],
        sampling=sampling(scale),
        attribution=attribution(scale, "subwords", "ngrams", "lm"),
    )
