"""Claim: models that differ in nothing but random seeds are recognisable. Which seed, among how many, and is it chaos?

    natfp run configs/paper/seeds.py [scale=small]
    natfp run configs/paper/seeds.py part=twin [scale=small]

`part=levels`: four inits, four orders, and four of both together, in pairs, of three and of all four, at the end of training;
with the twin, whose initial weights differ from the base arm's by one unit in the last place of one weight, and the null.
`part=twin`: the twin over training, beside another init, from step 0 to the end. If it becomes as recognisable as that, the
fingerprint of an init is chaos.

Cost of the toy on two CPU cores: 20 minutes for the levels, 11 arms, and 7 for the twin, whose arms are among them. Expected:
in pairs inits in 51 to 56 of 100 texts, orders in 54 to 60, both in 54 to 59, under ceilings of 96 to 98 %; of four 27 to 32,
31 to 35 and 31 to 36 (chance 25), under ceilings of 92 to 93; the twin at chance at every checkpoint.
"""

from typing import Literal

from scales import EXPERIMENTS, FRACTIONS, RUNS, Scale, attribution, sampling

from natfp_jax.config import Factor, Perturb, Seeds, Study


def study(scale: Scale = "toy", part: Literal["levels", "twin"] = "levels") -> Study:
    """A part of the study at a scale."""
    levels = (0, 1, 2, 3)
    if part == "twin":
        return Study(
            name=f"paper-twin-{scale}",
            experiment=EXPERIMENTS[scale],
            factors=(Factor("seeds.init", levels[:2]),),
            twin=Perturb(),
            run=RUNS[scale],
            sampling=sampling(scale, FRACTIONS),
            attribution=attribution(scale, "subwords", "ngrams"),
        )
    return Study(
        name=f"paper-seeds-{scale}",
        experiment=EXPERIMENTS[scale],
        factors=(
            Factor("seeds.init", levels),
            Factor("seeds.order", levels),
            Factor("seeds", tuple(Seeds(init=level, order=level) for level in levels)),
        ),
        design="one_at_a_time",
        twin=Perturb(),
        run=RUNS[scale],
        sampling=sampling(scale),
        attribution=attribution(scale, "subwords", "ngrams", "lm", class_counts=(3,)),
    )
