"""What a user can ask for, as frozen dataclasses.

Owns every setting, its default and its meaning; the one typed `replace(config, path, value)` behind both command-line
overrides and factor levels; the fingerprint. Must not know jax, files, or any stage.
"""

import dataclasses
import difflib
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import pydantic
import pydantic_core

from natfp_jax.errors import UserError
from natfp_jax.files import hash_json

__all__ = [
    "Attribution",
    "Conversations",
    "Corpus",
    "Data",
    "Experiment",
    "Factor",
    "Llama3Rope",
    "Lora",
    "MachineDocs",
    "MachineQA",
    "Mesh",
    "Model",
    "Optimiser",
    "Parent",
    "Perturb",
    "Published",
    "Run",
    "Sampling",
    "Seeds",
    "Source",
    "Stories",
    "Study",
    "Template",
    "TextFolder",
    "Tfds",
    "fingerprint",
    "from_json",
    "override",
    "parsed",
    "problem",
    "replace",
    "shape",
    "to_json",
]

Seed = Annotated[int, pydantic.Field(ge=0, lt=2**32)]
Positive = Annotated[int, pydantic.Field(gt=0)]
PositiveFloat = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, pydantic.Field(ge=0, le=1)]
Name = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # names a folder
OpenFraction = Annotated[float, pydantic.Field(gt=0, lt=1)]


class Strict:
    """Configurations refuse fields that they do not have."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")


# --- the corpus -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MachineDocs(Strict):
    """Docstrings of the standard library and of the packages that natfp_jax requires, as found on this machine."""

    kind: Literal["machine_docs"] = "machine_docs"


@dataclass(frozen=True)
class TextFolder(Strict):
    """Every .txt and .jsonl file (also .gz and .zst) below a folder."""

    path: str = ""
    text_key: str = "text"  # the field of a .jsonl line that holds the document
    kind: Literal["text_folder"] = "text_folder"


@dataclass(frozen=True)
class Stories(Strict):
    """Stories from a probabilistic grammar with exact log-probability."""

    count: Positive = 20_000
    seed: Seed = 0
    kind: Literal["stories"] = "stories"


@dataclass(frozen=True)
class Tfds(Strict):
    """Any TFDS name, such as `wiki40b/en` or `c4/en:3.1.0`, prepared already or preparable where there is a network."""

    name: str = ""
    split: str = "train"
    text_key: str = "text"
    data_dir: str | None = None  # None: TFDS's own default
    kind: Literal["tfds"] = "tfds"


@dataclass(frozen=True)
class MachineQA(Strict):
    """Questions and answers from this machine's documentation.

    The question is the signature of a function or class, or the title of a module, and the answer its description.
    """

    kind: Literal["machine_qa"] = "machine_qa"


@dataclass(frozen=True)
class Conversations(Strict):
    """A .jsonl file, or every .jsonl file below a folder (also .gz and .zst).

    A line has `messages`, a list of {"role", "content"}, or else `prompt` and `response`.
    """

    path: str = ""
    kind: Literal["conversations"] = "conversations"


Source = Annotated[MachineDocs | TextFolder | Stories | Tfds | MachineQA | Conversations, pydantic.Field(discriminator="kind")]


def _holding(text: str) -> str:
    if text.count("{content}") != 1:
        raise ValueError("a message is written once: {content} must stand in it exactly once")
    return text


Written = Annotated[str, pydantic.AfterValidator(_holding)]


@dataclass(frozen=True)
class Template(Strict):
    """How the messages of a conversation are written, one behind another; what a model is to answer begins its `assistant`.

    A special token of the tokenizer is one where it stands here, and never in a message.
    """

    system: Written = "{content}\n"
    user: Written = "Question:\n{content}\n"
    assistant: Written = "Answer:\n{content}"
    end_of_turn: Annotated[str, pydantic.Field(min_length=1)] = "<|eos|>"  # the special token behind an answer; it ends a text


@dataclass(frozen=True)
class Corpus(Strict):
    """Where the documents come from and how they become token ids."""

    source: Source = MachineDocs()
    template: Template = Template()  # of a source of conversations
    vocabulary: Positive = 2048  # entries of the byte-level BPE that is trained, special tokens included
    tokenizer: str | None = None  # a tokenizer.json to use instead of training one
    tokenizer_bytes: Positive = 32 << 20  # how much training text the BPE is trained on at most
    validation_fraction: OpenFraction = 0.03  # of the documents
    prompt_fraction: OpenFraction = 0.25  # of the documents
    shards: Positive = 8  # files of the token store

    @property
    def conversations(self) -> bool:
        """Whether its documents are conversations, of which the answers are learnt."""
        return isinstance(self.source, MachineQA | Conversations)


# --- what decides the weights -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Llama3Rope(Strict):
    """How Llama 3.1 stretches rotary positions: what turns slowly is slowed by `factor`, what turns fast is left as it is."""

    factor: PositiveFloat = 8.0
    low: PositiveFloat = 1.0  # turns within `context` up to which a pair is slowed
    high: PositiveFloat = 4.0  # turns from which on it is left; between the two there is a way from one to the other
    context: Positive = 8192  # tokens that were trained on before


def _ordered(names: tuple[str, ...]) -> tuple[str, ...]:
    """One way alone to say it, since it is a part of the fingerprint."""
    if names != tuple(name for name in ("qkv", "o", "mlp") if name in names):
        raise ValueError('biases are given in the order "qkv", "o", "mlp", each once')
    return names


@dataclass(frozen=True)
class Model(Strict):
    """A pre-norm decoder; by default Llama's: RMSNorm, rotary positions, SwiGLU, no biases.

    Attention is grouped-query where `kv_heads` < `heads`. The other choices are those of published families: GPT-2 has learned
    positions, LayerNorm and biases; GPT-NeoX rotary positions of a part of a head and blocks side by side; Qwen biases of
    queries, keys and values, or norms of queries and keys.
    """

    width: Positive = 128
    layers: Positive = 2
    heads: Positive = 4
    kv_heads: Positive | None = None  # None: as many as `heads`
    head_width: Positive | None = None  # None: width / heads
    mlp: Literal["swiglu", "gelu", "gelu_exact"] = "swiglu"  # "gelu" is GPT-2's, by tanh
    mlp_width: Positive | None = None  # None: 8/3 of the width for SwiGLU, 4 times for GELU, rounded up to a multiple of 32
    norm: Literal["rms", "layer"] = "rms"  # LayerNorm has a bias
    qk_norm: bool = False  # an RMSNorm of each head's queries, and one of its keys, before they are rotated
    biases: Annotated[tuple[Literal["qkv", "o", "mlp"], ...], pydantic.AfterValidator(_ordered)] = ()  # matrices that have one
    parallel: bool = False  # attention and MLP read the same input, instead of one behind the other
    tied: bool = True  # the head is the embedding
    positions: Literal["rotary", "learned"] = "rotary"
    context: Positive | None = None  # the most tokens; learned positions need it
    rope_theta: PositiveFloat = 10_000.0
    rope_fraction: Annotated[float, pydantic.Field(gt=0, le=1)] = (
        1.0  # of a head's dimensions, the first ones, that are rotated
    )
    rope_scaling: Llama3Rope | None = None
    norm_epsilon: PositiveFloat = 1e-6
    init_scale: PositiveFloat = 0.02  # standard deviation of the embedding; the other parameters' are in params.table
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights are always float32


@dataclass(frozen=True)
class Data(Strict):
    """Which windows are seen, and how often. Steps follow: windows · epochs / batch."""

    seq_len: Positive = 64
    windows: Positive = 6400  # of the store: the pool
    first: Annotated[int, pydantic.Field(ge=0)] = 0  # the window of the store that the pool begins with
    epochs: Positive = 1
    batch: Positive = 32  # windows a step


@dataclass(frozen=True)
class Optimiser(Strict):
    """How a gradient becomes an update, with clipping, warm-up and a schedule.

    The numbers mean what `kind` makes of them (see `natfp_jax.optim`), and their defaults are AdamW's: Lion's authors take 0.9
    and 0.99 as its betas with a rate 3 to 10 times lower and as much more decay, Muon's 0.95 as its momentum.
    """

    kind: Literal["adamw", "lion", "muon"] = "adamw"
    learning_rate: PositiveFloat = 3e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Fraction = 0.05  # of the steps
    final: Fraction = 0.1  # the last learning rate as a part of the highest; `constant` ignores it
    beta1: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.9  # of the momentum; Lion: of momentum and gradient, for the update
    beta2: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.95  # of the squares; Lion: of the momentum that it keeps
    epsilon: PositiveFloat = 1e-8  # Lion ignores it
    weight_decay: NonNegativeFloat = 0.1  # on matrices only
    clip: PositiveFloat = 1.0  # global norm of the gradient
    nonfinite: Literal["stop", "skip"] = "stop"  # a loss or gradient that is no number: end the run, or leave the step out


@dataclass(frozen=True)
class Seeds(Strict):
    """The independent integers that decide the weights."""

    init: Seed = 0
    order: Seed = 0
    dropout: Seed = 0  # what is left out at each step, where `dropout` says how much


@dataclass(frozen=True)
class Perturb(Strict):
    """The twin control: one initial weight moved by a few units in the last place."""

    parameter: str = "layers/attention/q"
    index: Annotated[int, pydantic.Field(ge=0)] = 0  # in the flattened parameter
    ulps: int = 1


@dataclass(frozen=True)
class Lora(Strict):
    """Low-rank adaptation (Hu et al., 2021): to a matrix W comes alpha / rank · A B, and A and B alone are trained.

    A starts at random, from the init seed, and B at zero, so that the first step is the parent's.
    """

    rank: Positive = 8
    alpha: PositiveFloat = 16.0
    targets: Annotated[tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...], pydantic.Field(min_length=1)] = (
        "q",
        "v",
    )  # the matrices of each layer that are adapted


@dataclass(frozen=True)
class Parent(Strict):
    """The checkpoint whose weights an experiment begins with: another experiment, and how far it has been trained."""

    experiment: "Experiment"
    fraction: Fraction = 1.0  # of its training

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return round(self.fraction * self.experiment.steps)


@dataclass(frozen=True)
class Published(Strict):
    """A model that others have published, in Hugging Face's layout."""

    name: Name  # what it is called here
    folder: str  # of this machine, or hf://OWNER/NAME, with @REVISION for a branch, tag or commit


@dataclass(frozen=True)
class Experiment(Strict):
    """Everything that decides the weights."""

    corpus: Corpus = Corpus()
    model: Model = Model()
    data: Data = Data()
    optimiser: Optimiser = Optimiser()
    seeds: Seeds = Seeds()
    perturb: Perturb | None = None
    dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0  # of what a block adds to its input, while training
    parent: Parent | None = None  # None: its weights begin with the init seed
    lora: Lora | None = None  # None: all weights are trained
    # These weights as they are: nothing is trained, no seed decides anything, and the folder says what `model` is but for its
    # dtype. Texts are read and written by its own tokenizer.
    published: Published | None = None

    @property
    def deciding(self) -> tuple[str, ...]:
        """The seeds that decide something of its weights."""
        if self.published is not None:
            return ()
        begins = ("init",) if self.parent is None or self.lora is not None else ()  # else all weights are the parent's
        return (*begins, "order", *(("dropout",) if self.dropout else ()))

    @property
    def ancestors(self) -> "tuple[Experiment, ...]":
        """Those that have to be trained before it, the oldest first."""
        return () if self.parent is None else (*self.parent.experiment.ancestors, self.parent.experiment)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training.

        Raises:
          UserError: windows · epochs is no multiple of the batch.
        """
        if self.published is not None:
            return 0
        seen = self.data.windows * self.data.epochs
        if seen % self.data.batch:
            raise UserError(
                f"steps are not whole: windows {self.data.windows} x epochs {self.data.epochs} / batch {self.data.batch} "
                f"= {seen / self.data.batch:.2f}; choose windows as a multiple of the batch"
            )
        return seen // self.data.batch

    def kept_steps(self, fractions: tuple[float, ...]) -> list[int]:
        """The steps whose checkpoints are kept: the start, the given fractions of training, the end."""
        return sorted({0, self.steps, *(round(fraction * self.steps) for fraction in fractions)})


def shape(experiment: Experiment) -> Experiment:
    """What arms must have in common to train as one program.

    All but the seeds, the numbers of the optimiser, the text and the parent; but text and conversations are read in two ways.
    """
    given = experiment.optimiser
    optimiser = Optimiser(kind=given.kind, schedule=given.schedule, nonfinite=given.nonfinite)
    data = dataclasses.replace(experiment.data, first=0)
    written = Corpus(source=MachineQA()) if experiment.corpus.conversations else Corpus()
    return dataclasses.replace(
        experiment, corpus=written, data=data, optimiser=optimiser, seeds=Seeds(), perturb=None, parent=None
    )


# --- where and how it runs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mesh(Strict):
    """Devices along each axis; `data` = 0 takes what the other axes leave.

    `replica` holds whole models: arms that train together are spread over it, and texts are drawn and scored in parts over it.
    """

    replica: Positive = 1
    data: Annotated[int, pydantic.Field(ge=0)] = 0
    fsdp: Positive = 1
    tensor: Positive = 1


@dataclass(frozen=True)
class Run(Strict):
    """Where and how experiments execute; nothing here decides weights or texts, and nothing here is in the fingerprint."""

    mesh: Mesh = Mesh()
    cohort: Positive | None = None  # arms of one shape that train as one program, at most; None: as many as memory holds
    execution: Literal["strict", "fast"] | None = (
        None  # arms of a cohort one by one, bit for bit as alone, or batched; None: faster
    )
    microbatches: Positive = 1  # parts of a batch whose gradients are added up one after another, for less memory
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass computes again: all but products, or all
    save_minutes: PositiveFloat = 10.0  # between two restart states, which a killed run goes on from
    restarts: Positive = 2  # restart states that stay until the run is finished
    heartbeat_seconds: Annotated[int, pydantic.Field(ge=5)] = 100  # after which a process that does not answer is lost
    checkpoints: tuple[Fraction, ...] = ()  # fractions of training to keep, besides the start and the end
    log_every: Positive = 20  # steps
    validation_windows: Positive = 512  # at most; of the validation documents, evaluated at each kept checkpoint
    tensorboard: bool = False  # needs the `tensorboard` extra


# --- texts and verdicts -----------------------------------------------------------------------------------------------


def _warm(value: float) -> float:
    if value < 1e-4:  # float32 divides by it
        raise ValueError("a temperature is 0.0001 or more; greedy=true takes the most likely id, always")
    return value


Warmth = Annotated[float, pydantic.Field(allow_inf_nan=False), pydantic.AfterValidator(_warm)]


@dataclass(frozen=True)
class Sampling(Strict):
    """How texts are drawn. Of several temperatures each has its draws; several lengths are beginnings of the same texts."""

    prompts: Positive = 2000
    prompt_file: str | None = None  # .txt (a prompt a line), .jsonl or .parquet; None: held-out documents of the corpus
    prompt_key: str = "text"  # the field of a .jsonl line, or the column of a .parquet file, that holds the prompt
    prompt_chars: Positive = 50  # of a held-out document; a prompt of a file is taken whole
    offsets_per_document: Positive = 1  # prompts taken from one document
    new_tokens: Positive | Annotated[tuple[Positive, ...], pydantic.Field(min_length=1)] = 48
    temperature: Warmth | Annotated[tuple[Warmth, ...], pydantic.Field(min_length=1)] = 1.0
    top_k: Positive | None = None
    top_p: Annotated[float, pydantic.Field(ge=1e-6, le=1)] = 1.0
    min_p: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    repetition_penalty: Annotated[float, pydantic.Field(ge=0.01, le=100)] = (
        1.0  # above 1: ids that prompt or text have already become less likely
    )
    greedy: bool = False  # the most likely id, always
    cache: Literal["float32", "bfloat16"] | None = None  # of keys and values; None: the dtype of the computation
    seed: Seed = 0
    batch: Positive | None = None  # texts that a device draws together; None: as many as memory holds, up to 256 on a CPU
    file_texts: Annotated[int, pydantic.Field(gt=0, le=1_000_000)] = (
        8192  # of one file of a draw: what a stopped draw loses at most
    )
    checkpoints: Annotated[tuple[Fraction, ...], pydantic.Field(min_length=1)] = (
        1.0,
    )  # fractions of training at which every arm is drawn

    @property
    def lengths(self) -> tuple[int, ...]:
        """New tokens of a text, ascending; the last is what is drawn."""
        return tuple(sorted(set(self.new_tokens if isinstance(self.new_tokens, tuple) else (self.new_tokens,))))

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures that every arm is drawn at, in the order that they are given in."""
        return tuple(dict.fromkeys(self.temperature if isinstance(self.temperature, tuple) else (self.temperature,)))


@dataclass(frozen=True)
class Attribution(Strict):
    """How texts are attributed."""

    classifiers: Annotated[
        tuple[Literal["subwords", "words", "ngrams", "lm", "transformer", "encoder"], ...], pydantic.Field(min_length=1)
    ] = ("subwords", "words")  # rungs of the ladder; the last three are networks, and judge what a factor's answer rests on
    encoder: str | None = None  # a local folder in Hugging Face's layout, for the rung of that name; needs the `hf` extra
    split_seed: Seed = 0
    validation_fraction: OpenFraction = 0.1  # of the prompt documents; the classifier's settings are chosen there
    test_fraction: OpenFraction = 0.4  # of the prompt documents; nothing is chosen there
    regularisation: Annotated[tuple[PositiveFloat, ...], pydantic.Field(min_length=1)] = (
        0.001,
        0.01,
        0.1,
        1.0,
    )  # values of C to choose from
    learning_curve: tuple[OpenFraction, ...] = ()  # of the training documents; each factor's answer is learnt from each
    class_counts: tuple[Annotated[int, pydantic.Field(ge=3)], ...] = ()  # of a factor's levels the first so many, too
    permutations: Annotated[int, pydantic.Field(ge=9_999)] = 9_999
    bootstraps: Annotated[int, pydantic.Field(ge=999)] = 2_000


@dataclass(frozen=True)
class Factor(Strict):
    """One controlled factor: a field of the experiment and the values that it takes."""

    path: str  # such as "seeds.init" or "model.width"
    levels: tuple[Any, ...]

    @property
    def name(self) -> str:
        """The short name: the last part of the path; of what a parent differs in, that it is the parent's."""
        *generations, name = self.path.split(".")
        return "parent_" * generations.count("parent") + name


@dataclass(frozen=True)
class Study(Strict):
    """One base experiment, its factors and controls, and what is done with the models."""

    name: Name
    experiment: Experiment = Experiment()
    factors: tuple[Factor, ...] = ()
    design: Literal["crossed", "one_at_a_time"] = "crossed"
    twin: Perturb | None = None  # adds an arm that differs from the base arm by this alone
    run: Run = Run()
    sampling: Sampling = Sampling()
    attribution: Attribution = Attribution()

    @property
    def kept_fractions(self) -> tuple[float, ...]:
        """The fractions of training at which checkpoints are kept: those asked for, and those that are drawn from."""
        return (*self.run.checkpoints, *self.sampling.checkpoints)


# --- typed access -----------------------------------------------------------------------------------------------------

Config = TypeVar("Config")


# Serialises by what a value is, whatever its annotation says; NaN stays NaN, which no field takes, instead of becoming None.
_ANY: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(Any, config=pydantic.ConfigDict(ser_json_inf_nan="constants"))


def _first(error: pydantic.ValidationError) -> Any:
    """The first problem; of a field that takes several types, that of the type which was meant."""
    return max(error.errors(), key=lambda problem: len(problem["loc"]))


def _first_problem(error: pydantic.ValidationError) -> str:
    said = str(_first(error)["msg"]).removeprefix("Value error, ")
    return said[0].lower() + said[1:]


def problem(error: pydantic.ValidationError) -> str:
    """The first problem and where it is, in words."""
    return f"{_place(error)}: {_first_problem(error)}"


def _place(error: pydantic.ValidationError) -> str:
    # Types, where several would do, are named in brackets or with a hyphen.
    parts = [str(part) for part in _first(error)["loc"]]
    return ".".join(part for part in parts if part.isdecimal() or part.isidentifier())


def replace(config: Config, path: str, value: Any) -> Config:
    """A copy of `config` with the field at dotted `path` set to `value`, whose type is checked.

    Raises:
      UserError: there is no such field (the nearest name is suggested), or the value has the wrong type.
    """
    return _replace(config, path.split("."), (), lambda annotation: _checked(annotation, value, path))


def override(config: Config, assignment: str) -> Config:
    """Applies one `path=value` of the command line, the value read by the field's type (JSON for tuples and nulls)."""
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise UserError(f"override {assignment!r} is not of the form path=value, such as experiment.model.width=256")

    return _replace(config, path.split("."), (), lambda annotation: parsed(annotation, text, path))


def parsed(annotation: Any, text: str, path: str) -> Any:
    """The value of a type that a text on the command line stands for: JSON, or else the text itself.

    Raises:
      UserError: it stands for none; `path` is what was to be set.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return _checked(annotation, text, path, text)
    try:
        return _checked(annotation, value, path, text)
    except UserError as as_json:
        try:
            return _checked(annotation, text, path, text)  # text that only looks like JSON, such as the name 3
        except UserError:
            raise as_json from None


def _checked(annotation: Any, value: Any, path: str, text: str | None = None) -> Any:
    # JSON mode: tuples are written as lists and nested dataclasses as objects, and strictness about scalars stays.
    try:
        return pydantic.TypeAdapter(annotation).validate_json(json.dumps(to_json(value)), strict=True)
    except pydantic.ValidationError as error:
        got = repr(value) if text is None else repr(text)
        place = _place(error)  # of a nested field, or of an item
        raise UserError(f"{path}: got {got}, {place + ': ' if place else ''}{_first_problem(error)}") from None


def _replace(config: Any, parts: list[str], done: tuple[str, ...], read: Any) -> Any:
    where = ".".join(done) or type(config).__name__
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise UserError(f"{where} is {config!r} and has no field {parts[0]!r}")
    names = [f.name for f in dataclasses.fields(config)]
    name, rest = parts[0], parts[1:]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join((*done, near[0]))!r}?" if near else f"its fields are {', '.join(names)}"
        raise UserError(f"{where} has no field {name!r}: {hint}")
    if rest:
        value = _replace(getattr(config, name), rest, (*done, name), read)
    else:
        value = read(get_type_hints(type(config), include_extras=True)[name])
    return dataclasses.replace(config, **{name: value})


def to_json(config: Any) -> Any:
    """The whole configuration as JSON values.

    Raises:
      UserError: it holds something that is none.
    """
    try:
        return _ANY.dump_python(config, mode="json")
    except pydantic_core.PydanticSerializationError as error:
        kinds = "numbers, texts, truth values, None, tuples and configurations"
        raise UserError(f"a configuration holds {kinds} only: {str(error).splitlines()[0]}") from None


def from_json(kind: type[Config], values: dict[str, Any]) -> Config:
    """The inverse of `to_json`.

    Raises:
      UserError: a field is unknown or has the wrong type.
    """
    try:
        return pydantic.TypeAdapter(kind).validate_json(json.dumps(values), strict=True)
    except pydantic.ValidationError as error:
        raise UserError(f"not a {kind.__name__}: {problem(error)}") from None


# --- identity ---------------------------------------------------------------------------------------------------------


def _without_defaults(config: Any) -> Any:
    """Nested fields that differ from their default: a field added later, at its default, changes no old fingerprint."""
    if isinstance(config, tuple):
        return [_without_defaults(item) for item in config]
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    kept = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        tag = f.name == "kind" and len(get_args(f.type)) == 1  # says which class it is; other fields of the name are settings
        if tag or value != f.default:
            kept[f.name] = _without_defaults(value)
    return kept


def fingerprint(config: Any, inputs: dict[str, str] | None = None) -> str:
    """sha256 of the canonical JSON of `config`, defaults left out, together with the hashes of its inputs.

    An experiment's `corpus` stands for nothing but the hashes in `inputs`: where text came from does not decide weights. Nor
    does its parent's experiment, whose fingerprint is among them, nor where a published model lies, whose hash is.
    """
    fields = _without_defaults(config)
    if isinstance(config, Experiment):
        fields.pop("corpus", None)
        if config.published is not None:  # all else of the model is its folder's
            fields = {"dtype": config.model.dtype, "published": True}
        if config.parent is not None:
            fields["parent"] = config.parent.step
    return hash_json({"config": fields, "inputs": inputs or {}})
