"""Claim: fingerprints arise in supervised fine-tuning too. Of what, and does a parent's own survive it?

    natfp run configs/paper/sft.py [part=lora|parents] [scale=small]

The base arm of the other studies is trained further, on questions and answers from this machine's documentation.

`part=full`: children of one parent, all of whose weights are trained with dropout. They differ in the order of the data, in
what is dropped, in the learning rate, or in which part of the data they see. `part=lora`: children that train adapters alone,
and differ in how these begin, in the order, or in both. `part=parents`: children of two parents that differ in the init seed,
each trained in the same two orders, and drawn from at step 0 and later: how much of the parent's fingerprint is left?

At the toy's scale the answers are from docstrings, many of which the parent was trained on: "held out" is meant of
the questions, and holds for all arms alike.

Cost of the toy on two CPU cores: 15 minutes for each part, by estimate; 4 to 6 arms. Expected: other conversations in 58 of
100 answers; order, dropout, rate and adapters in no more than chance in the end, under ceilings of 58 to 80 %; the parent's
init in 60 before and at chance in the end, under a ceiling of 98 and then 90 %; twins at chance.
"""

from dataclasses import replace
from typing import Literal

from scales import CHILDREN, RUNS, Scale, attribution, sampling

from natfp_jax.config import Factor, Lora, Perturb, Seeds, Study


def study(scale: Scale = "toy", part: Literal["full", "lora", "parents"] = "full") -> Study:
    """A part of the study at a scale."""
    experiment = CHILDREN[scale]
    rate, windows = experiment.optimiser.learning_rate, experiment.data.windows
    if part == "parents":
        return Study(
            name=f"paper-sft-parents-{scale}",
            experiment=experiment,
            factors=(Factor("parent.experiment.seeds.init", (0, 1)), Factor("seeds.order", (0, 1))),
            twin=Perturb(),
            run=RUNS[scale],
            sampling=sampling(scale, (0.0, 0.1, 0.3, 1.0)),
            attribution=attribution(scale, "subwords", "ngrams"),
        )
    if part == "lora":
        return Study(
            name=f"paper-sft-lora-{scale}",
            # Adapters take a rate some times that of all weights (Hu et al., 2021, appendix D).
            experiment=replace(experiment, lora=Lora(), optimiser=replace(experiment.optimiser, learning_rate=3 * rate)),
            factors=(
                Factor("seeds.init", (0, 1)),
                Factor("seeds.order", (0, 1)),
                Factor("seeds", (Seeds(init=0, order=0), Seeds(init=1, order=1))),
            ),
            design="one_at_a_time",
            twin=Perturb(),
            run=RUNS[scale],
            sampling=sampling(scale),
            attribution=attribution(scale, "subwords", "ngrams", "lm"),
        )
    return Study(
        name=f"paper-sft-full-{scale}",
        experiment=experiment,
        factors=(
            Factor("seeds.order", (0, 1)),
            Factor("seeds.dropout", (0, 1)),
            Factor("optimiser.learning_rate", (rate, rate / 3)),
            Factor("data.first", (0, windows)),
        ),
        design="one_at_a_time",
        twin=Perturb(),
        run=RUNS[scale],
        sampling=sampling(scale),
        attribution=attribution(scale, "subwords", "ngrams", "lm"),
    )
