"""Open in the paper: do fingerprints fade, stay or grow in extended training?

    natfp run configs/paper/long.py [scale=small]
    natfp run configs/paper/long.py text=stories [scale=small]

Init, order and the twin after 1, 2, 4 and 8 epochs of a quarter of the base's windows, at a constant learning rate: no
checkpoint is nearer to the end of a schedule than another. `text=stories`: instead as many windows of a grammar's stories as
those epochs have together, none seen twice: what comes of repetition is then left out.

Cost of the toy on two CPU cores: 15 minutes, 4 arms of 400 steps. Expected: both grow; from one epoch to eight init from 56
to 69 of 100 texts by subwords and from 57 to 74 by ngrams, order from 68 to 78 and from 71 to 83; the twin at chance.
`text=stories` has not been run.
"""

from dataclasses import replace
from typing import Literal

from scales import EXPERIMENTS, PROMPTS, RUNS, Scale, attribution, sampling

from natfp_jax.config import Factor, Perturb, Stories, Study

EPOCHS = 8
CHECKPOINTS = (1 / 8, 1 / 4, 1 / 2, 1.0)


def study(scale: Scale = "toy", text: Literal["epochs", "stories"] = "epochs") -> Study:
    """The study at a scale."""
    base = EXPERIMENTS[scale]
    windows = base.data.windows // 4
    experiment = replace(
        base,
        data=replace(base.data, windows=windows, epochs=EPOCHS),
        optimiser=replace(base.optimiser, schedule="constant"),
    )
    if text == "stories":
        tokens = windows * EPOCHS * (base.data.seq_len + 1)
        experiment = replace(
            experiment,
            # A story has some 60 tokens; each prompt is of a story of its own, and most stories are for training.
            corpus=replace(base.corpus, source=Stories(count=max(tokens // 50, 20 * PROMPTS[scale])), prompt_fraction=0.1),
            data=replace(base.data, windows=windows * EPOCHS),
        )
    return Study(
        name=f"paper-long-{text}-{scale}",
        experiment=experiment,
        factors=(Factor("seeds.init", (0, 1)), Factor("seeds.order", (0, 1))),
        design="one_at_a_time",
        twin=Perturb(),
        run=replace(RUNS[scale], checkpoints=CHECKPOINTS),
        sampling=sampling(scale, CHECKPOINTS),
        attribution=attribution(scale, "subwords", "ngrams"),
    )
