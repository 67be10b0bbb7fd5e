"""Claim: models trained with other optimiser settings are recognisable, on the same windows from the same seeds.

    natfp run configs/paper/optimiser.py [scale=small]

One setting at a time: learning rate, schedule, batch size, weight decay, warm-up, the two betas, and the kind of optimiser:
Lion with a tenth of AdamW's learning rate, since its updates are larger, and ten times its weight decay, which the rate is
multiplied with, as its authors advise; and Muon, whose updates are scaled to AdamW's size.
Another batch size sees the same windows, in the same order, in another number of steps.

Cost of the toy on two CPU cores: 20 minutes, 10 arms. Expected: the learning rate in 58 to 65 of 100 texts, the batch in 57
to 60, the kind in 49 to 63 (chance 33); warm-up and betas in 50 to 54; schedule and weight decay at chance, under ceilings of
78 and 62 %, where those of all others are 90 to 98.
"""

from dataclasses import replace

from scales import EXPERIMENTS, RUNS, Scale, attribution, sampling

from natfp_jax.config import Factor, Study


def study(scale: Scale = "toy") -> Study:
    """The study at a scale."""
    experiment = EXPERIMENTS[scale]
    settings, batch = experiment.optimiser, experiment.data.batch
    lion = replace(settings, kind="lion", learning_rate=settings.learning_rate / 10, weight_decay=settings.weight_decay * 10)
    return Study(
        name=f"paper-optimiser-{scale}",
        experiment=experiment,
        factors=(
            Factor("optimiser.learning_rate", (settings.learning_rate, settings.learning_rate / 3)),
            Factor("optimiser.schedule", (settings.schedule, "linear")),
            Factor("data.batch", (batch, batch * 2)),
            Factor("optimiser.weight_decay", (settings.weight_decay, 0.0)),
            Factor("optimiser.warmup", (settings.warmup, 0.2)),
            Factor("optimiser.beta1", (settings.beta1, 0.8)),
            Factor("optimiser.beta2", (settings.beta2, 0.99)),
            Factor("optimiser", (settings, lion, replace(settings, kind="muon"))),
        ),
        design="one_at_a_time",
        run=RUNS[scale],
        sampling=sampling(scale),
        attribution=attribution(scale, "subwords", "ngrams", "lm"),
    )
