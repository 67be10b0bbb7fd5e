"""What the studies of this folder have in common: the base experiment at three scales, and how texts are drawn and judged.

    toy     two CPU cores: a 0.7M-parameter decoder, one epoch of 410,000 tokens of this machine's documentation
    small   one GPU of 80 GB, at most 8 hours a study: 34M parameters, one epoch of 52M tokens of wiki40b/en
    paper   a slice such as v5e-16, about a day a study: 350M parameters, one epoch of 2.1G tokens of c4/en

A study is run at a scale by `natfp run configs/paper/seeds.py scale=small`; left out, it is `toy`. All but long.py keep the
same checkpoints of the same base arm: with one --out, an arm that several studies have is trained once.

The corpora of `small` are prepared once where there is a network; those of `paper`, c4/en and c4/realnewslike, likewise:

    python -c "import tensorflow_datasets as tfds, tensorflow_datasets.text.wiki40b, tensorflow_datasets.text.lm1b
    for name in ('wiki40b/en', 'lm1b'): tfds.builder(name).download_and_prepare()"

sft.py takes the conversations of these two scales from `conversations.jsonl`, in the folder that the command is given in: such
as Hugging Face `datasets` writes of HuggingFaceH4/ultrachat_200k. Half of it is for the prompts of `paper`.

`small` and `paper` are sized by counting, and have not been run.
"""

from typing import Literal

from natfp_jax.config import (
    Attribution,
    Conversations,
    Corpus,
    Data,
    Experiment,
    MachineDocs,
    MachineQA,
    Mesh,
    Model,
    Optimiser,
    Parent,
    Run,
    Sampling,
    Seeds,
    Source,
    Stories,
    Template,
    Tfds,
)

Scale = Literal["toy", "small", "paper"]

FRACTIONS = (0.0, 0.03, 0.1, 0.3, 1.0)  # of training, at which checkpoints are kept, whatever a study draws from

EXPERIMENTS = {
    "toy": Experiment(
        corpus=Corpus(source=MachineDocs(), vocabulary=2048),
        model=Model(width=128, layers=2, heads=4),
        data=Data(seq_len=64, windows=6400, epochs=1, batch=32),
        optimiser=Optimiser(learning_rate=3e-3),
        seeds=Seeds(init=0, order=0),
    ),
    "small": Experiment(
        corpus=Corpus(source=Tfds("wiki40b/en"), vocabulary=16_384, validation_fraction=0.002, prompt_fraction=0.01),
        model=Model(width=512, layers=8, heads=8),
        data=Data(seq_len=256, windows=204_800, epochs=1, batch=128),
        optimiser=Optimiser(learning_rate=1e-3),
        seeds=Seeds(init=0, order=0),
    ),
    "paper": Experiment(
        # Enough for the disjoint halves of data.py; the whole of it would be tokenised for nothing.
        corpus=Corpus(
            source=Tfds("c4/en", split="train[:4%]"), vocabulary=32_768, validation_fraction=0.0005, prompt_fraction=0.01
        ),
        model=Model(width=1024, layers=24, heads=16, dtype="bfloat16"),
        data=Data(seq_len=1024, windows=2_097_152, epochs=1, batch=512),
        optimiser=Optimiser(learning_rate=5e-4),
        seeds=Seeds(init=0, order=0),
    ),
}
# What the base arm is trained further on, in fine-tuning.
CHILDREN = {
    "toy": Experiment(
        corpus=Corpus(
            source=MachineQA(), template=Template(user="Q: {content}\n", assistant="A: {content}"), prompt_fraction=0.15
        ),
        model=EXPERIMENTS["toy"].model,
        data=Data(seq_len=96, windows=3200, epochs=2, batch=32),
        optimiser=Optimiser(learning_rate=1e-3),
        dropout=0.1,
        parent=Parent(EXPERIMENTS["toy"]),
    ),
    "small": Experiment(
        corpus=Corpus(source=Conversations("conversations.jsonl"), validation_fraction=0.01, prompt_fraction=0.15),
        model=EXPERIMENTS["small"].model,
        data=Data(seq_len=512, windows=25_600, epochs=1, batch=64),
        optimiser=Optimiser(learning_rate=2e-4),
        dropout=0.1,
        parent=Parent(EXPERIMENTS["small"]),
    ),
    "paper": Experiment(
        corpus=Corpus(source=Conversations("conversations.jsonl"), validation_fraction=0.002, prompt_fraction=0.5),
        model=EXPERIMENTS["paper"].model,
        data=Data(seq_len=1024, windows=51_200, epochs=1, batch=128),
        optimiser=Optimiser(learning_rate=5e-5),
        dropout=0.1,
        parent=Parent(EXPERIMENTS["paper"]),
    ),
}
OTHER_CORPUS: dict[Scale, Source] = {"toy": Stories(), "small": Tfds("lm1b"), "paper": Tfds("c4/realnewslike")}
PROMPTS = {"toy": 2_000, "small": 10_000, "paper": 100_000}
RUNS = {
    "toy": Run(checkpoints=FRACTIONS),
    "small": Run(checkpoints=FRACTIONS),
    "paper": Run(checkpoints=FRACTIONS, mesh=Mesh(fsdp=16), remat="full"),
}


def sampling(scale: Scale, checkpoints: tuple[float, ...] = (1.0,)) -> Sampling:
    """The same prompts and lengths in every study of a scale."""
    return Sampling(prompts=PROMPTS[scale], new_tokens=32 if scale == "toy" else 64, checkpoints=checkpoints)


def attribution(scale: Scale, *classifiers: str, class_counts: tuple[int, ...] = ()) -> Attribution:
    """With permutations enough that something can be left after Holm's correction of some hundred tests."""
    permutations = 9_999 if scale == "toy" else 99_999
    return Attribution(classifiers=classifiers, class_counts=class_counts, permutations=permutations)
