"""Decoders that others publish, as ours: which of our options each family is, and how its parameters are called and lie.

Owns the meaning of config.json and of tensor names, in Hugging Face's layout, for Llama and its kin (Mistral, Qwen2, Qwen3),
GPT-NeoX (Pythia) and GPT-2. Must not know files, or values of parameters.

Letters are those of `params`; a digit counts what is fused.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic

from natfp_jax.config import Llama3Rope, Model, problem
from natfp_jax.errors import UserError
from natfp_jax.params import dims, table

__all__ = ["FAMILIES", "LLAMA", "Description", "Family", "Lies", "described"]


# --- names and axes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lies:
    """How one of our parameters lies among theirs.

    Attributes:
      name: of their tensor; of a layer's with `{}` for its number.
      axes: their dimensions, with a space between two; letters that stand together are one flattened dimension.
      part: of what is fused, along the dimension of the digit.
    """

    name: str
    axes: str
    part: int | None = None

    def shape(self, size: Mapping[str, int]) -> tuple[int, ...]:
        """Of their tensor."""
        return tuple(math.prod(_length(letter, size) for letter in group) for group in self.axes.split())

    def ours(self, theirs: np.ndarray, letters: str, size: Mapping[str, int]) -> np.ndarray:
        """Their tensor with our axes `letters` (those of one layer)."""
        flat = self.axes.replace(" ", "")
        whole = theirs.reshape([_length(letter, size) for letter in flat])
        if self.part is not None:
            place = next(place for place, letter in enumerate(flat) if letter.isdecimal())
            whole, flat = whole.take(self.part, axis=place), flat[:place] + flat[place + 1 :]
        return whole.transpose([flat.index(letter) for letter in letters])

    def theirs(self, ours: np.ndarray, letters: str) -> np.ndarray:
        """The inverse of `ours`, of what is not fused; as it lies in memory, for that is what is written."""
        flat = self.axes.replace(" ", "")
        size = dict(zip(letters, ours.shape, strict=True))
        return np.ascontiguousarray(ours.transpose([letters.index(letter) for letter in flat]).reshape(self.shape(size)))


def _length(letter: str, size: Mapping[str, int]) -> int:
    return int(letter) if letter.isdecimal() else size[letter]


def _matrices(names: Mapping[str, str], turned: bool = False) -> dict[str, Lies]:
    """Matrices and their biases: [out, in], as PyTorch's Linear has them, or `turned`, as GPT-2's Conv1D."""
    found = dict[str, Lies]()
    for path, name in names.items():
        outputs, inputs = _SIDES[path]
        axes = f"{inputs} {outputs}" if turned else f"{outputs} {inputs}"
        found |= {path: Lies(f"{name}.weight", axes), f"{path}_bias": Lies(f"{name}.bias", outputs)}
    return found


def _norms(names: Mapping[str, str]) -> dict[str, Lies]:
    found = dict[str, Lies]()
    for path, name in names.items():
        found |= {path: Lies(f"{name}.weight", "D"), f"{path}_bias": Lies(f"{name}.bias", "D")}
    return found


_SIDES = {  # of each matrix what comes out and what goes in
    "layers/attention/q": ("NH", "D"),
    "layers/attention/k": ("KH", "D"),
    "layers/attention/v": ("KH", "D"),
    "layers/attention/o": ("D", "NH"),
    "layers/mlp/gate": ("F", "D"),
    "layers/mlp/up": ("F", "D"),
    "layers/mlp/down": ("D", "F"),
}


# --- config.json ------------------------------------------------------------------------------------------------------

_Size = Annotated[int, pydantic.Field(gt=0, lt=2**31)]
_Id = Annotated[int, pydantic.Field(ge=0)]
_Number = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
_Biases = tuple[Literal["qkv", "o", "mlp"], ...]
_Gelu = Literal["gelu", "gelu_exact"]
_GELU: dict[str, _Gelu] = {"gelu_new": "gelu", "gelu_fast": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}


@dataclass(frozen=True)
class Description:
    """What a config.json describes.

    Attributes:
      vocabulary: rows of the embedding.
      context: the tokens that it was trained on at a time.
      limit: the most tokens that are computed here as published; None: any number.
      begin: the id that comes before a text.
      end: the id that ends one.
      notes: what a reader must know of it.
    """

    model: Model
    vocabulary: int
    context: int
    limit: int | None
    begin: int
    end: int
    notes: tuple[str, ...] = ()


class _Config(pydantic.BaseModel):
    """Fields that are read; all others say nothing of the numbers."""

    model_config = pydantic.ConfigDict(extra="ignore", strict=True)

    vocab_size: _Size
    bos_token_id: _Id | None = None
    eos_token_id: _Id | Annotated[list[_Id], pydantic.Field(min_length=1)] | None = None

    def _described(self, model: Model, context: int, limit: int | None = None, *notes: str) -> Description:
        """The decoder with what all families say alike.

        Raises:
          UserError: an id is none of the vocabulary, or it has none that begins or ends a text.
        """
        said, ends = list(notes), [self.eos_token_id] if isinstance(self.eos_token_id, int) else self.eos_token_id or []
        if len(ends) > 1:
            said.append(f"ends a text by the id {ends[0]} alone, of {', '.join(map(str, ends))} that end one")
        ids = [one for one in (self.bos_token_id, *ends) if one is not None]
        if not ids:
            raise UserError("bos_token_id and eos_token_id are missing: give the ids that begin and end a text")
        if wrong := [one for one in ids if one >= self.vocab_size]:
            raise UserError(f"the ids {', '.join(map(str, wrong))} that begin or end a text are none of {self.vocab_size}")
        return Description(model, self.vocab_size, context, limit, ids[0], (ends or ids)[0], tuple(said))


class _Rope(pydantic.BaseModel):
    """Of version 4 `rope_scaling`, whose `rope_type` was `type` once; of version 5 `rope_parameters`, with theta in it."""

    model_config = pydantic.ConfigDict(extra="ignore", strict=True)

    rope_type: str | None = None
    type: str | None = None
    rope_theta: _Number | None = None
    partial_rotary_factor: _Number | None = None
    factor: _Number | None = None
    low_freq_factor: _Number | None = None
    high_freq_factor: _Number | None = None
    original_max_position_embeddings: _Size | None = None

    def scaling(self) -> Llama3Rope | None:
        """How positions are stretched.

        Raises:
          UserError: in a way that is not known here.
        """
        kind = self.rope_type or self.type or "default"
        if kind == "default":
            return None
        factor, low, high = self.factor, self.low_freq_factor, self.high_freq_factor
        context = self.original_max_position_embeddings
        if kind != "llama3" or factor is None or low is None or high is None or context is None:
            raise UserError(f'rope_type "{kind}" is not known here, with what goes with it; expected "default" or "llama3"')
        return Llama3Rope(factor, low, high, context)


class _Llama(_Config):
    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    hidden_act: str = "silu"
    max_position_embeddings: _Size = 2048
    rms_norm_eps: _Number = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: _Number = 10_000.0
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    sliding_window: _Size | None = None
    use_sliding_window: bool | None = None
    layer_types: list[str] | None = None

    _qk_norm: ClassVar[bool] = False

    @property
    def biases(self) -> _Biases:
        return (*(("qkv", "o") if self.attention_bias else ()), *(("mlp",) if self.mlp_bias else ()))

    def description(self) -> Description:
        if self.hidden_act != "silu":
            raise UserError(f'hidden_act "{self.hidden_act}" is not known here, expected "silu"')
        rope = self.rope_parameters or self.rope_scaling or _Rope()
        model = Model(
            width=self.hidden_size,
            layers=self.num_hidden_layers,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            head_width=self.head_dim,
            mlp_width=self.intermediate_size,
            qk_norm=self._qk_norm,
            biases=self.biases,
            tied=self.tie_word_embeddings,
            rope_theta=rope.rope_theta or self.rope_theta,
            rope_scaling=rope.scaling(),
            norm_epsilon=self.rms_norm_eps,
        )
        if (window := self._window()) is not None and window < self.max_position_embeddings:
            note = f"attends to the last {window} tokens alone: with so many at most, that is no difference"
            return self._described(model, window, window, note)
        return self._described(model, self.max_position_embeddings)

    def _window(self) -> int | None:
        """The tokens that some layer attends to at most."""
        sliding = self.layer_types is None or "sliding_attention" in self.layer_types
        return self.sliding_window if sliding and self.use_sliding_window is not False else None


class _Mistral(_Llama):
    sliding_window: _Size | None = 4096  # as transformers have it, where nothing is said


class _Qwen2(_Llama):
    max_position_embeddings: _Size = 32_768
    use_sliding_window: bool | None = False

    @property
    def biases(self) -> _Biases:
        return ("qkv",)  # it has no field for them


class _Qwen3(_Llama):
    head_dim: _Size | None = 128
    max_position_embeddings: _Size = 32_768
    use_sliding_window: bool | None = False
    _qk_norm: ClassVar[bool] = True


class _NeoX(_Config):
    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    hidden_act: str = "gelu"
    rotary_pct: _Number | None = None
    rotary_emb_base: _Number | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    max_position_embeddings: _Size = 2048
    layer_norm_eps: _Number = 1e-5
    use_parallel_residual: bool = True
    tie_word_embeddings: bool = False
    attention_bias: bool = True

    def description(self) -> Description:
        rope = self.rope_parameters or self.rope_scaling or _Rope()
        if rope.scaling() is not None:
            raise UserError('rope_type "llama3" is not known of this family, expected "default"')
        fraction = self.rotary_pct or rope.partial_rotary_factor or 0.25
        if fraction > 1:
            raise UserError(f"rotary_pct {fraction} is no part of a head, expected at most 1")
        model = Model(
            width=self.hidden_size,
            layers=self.num_hidden_layers,
            heads=self.num_attention_heads,
            mlp=_gelu("hidden_act", self.hidden_act),
            mlp_width=self.intermediate_size,
            norm="layer",
            biases=(*(("qkv", "o") if self.attention_bias else ()), "mlp"),
            parallel=self.use_parallel_residual,
            tied=self.tie_word_embeddings,
            rope_theta=self.rotary_emb_base or rope.rope_theta or 10_000.0,
            rope_fraction=fraction,
            norm_epsilon=self.layer_norm_eps,
        )
        return self._described(model, self.max_position_embeddings)


class _GPT2(_Config):
    n_embd: _Size
    n_layer: _Size
    n_head: _Size
    n_inner: _Size | None = None
    n_positions: _Size = 1024
    activation_function: str = "gelu_new"
    layer_norm_epsilon: _Number = 1e-5
    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False

    def description(self) -> Description:
        if not self.scale_attn_weights or self.scale_attn_by_inverse_layer_idx:
            raise UserError("scale_attn_weights and scale_attn_by_inverse_layer_idx are not known here but as true and false")
        model = Model(
            width=self.n_embd,
            layers=self.n_layer,
            heads=self.n_head,
            mlp=_gelu("activation_function", self.activation_function),
            mlp_width=self.n_inner or 4 * self.n_embd,
            norm="layer",
            biases=("qkv", "o", "mlp"),
            tied=self.tie_word_embeddings,
            positions="learned",
            context=self.n_positions,
            norm_epsilon=self.layer_norm_epsilon,
        )
        return self._described(model, self.n_positions, self.n_positions)


def _gelu(field_name: str, given: str) -> _Gelu:
    if given not in _GELU:
        raise UserError(f'{field_name} "{given}" is not known here, expected one of {", ".join(sorted(_GELU))}')
    return _GELU[given]


# --- families ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """One kind of decoder, as it is published.

    Attributes:
      read: config.json → the class that knows its fields.
      prefix: before the names of all but the head; a decoder that was saved without its head lacks it.
      parameters: our path → theirs.
      idle: names of tensors that decide nothing, as a pattern: what older versions saved beside the parameters.
    """

    read: Callable[[dict[str, Any]], Any]
    prefix: str
    parameters: dict[str, Lies] = field(repr=False)
    idle: re.Pattern[str]

    def named(self, model: Model) -> dict[str, Lies]:
        """Our path → theirs, of every parameter of a model."""
        return {path: self.parameters[path] for path in table(model, 1)}


LLAMA = Family(
    read=_Llama.model_validate,
    prefix="model.",
    parameters={
        "embedding": Lies("model.embed_tokens.weight", "V D"),
        **_norms(
            {
                "layers/attention/norm": "model.layers.{}.input_layernorm",
                "layers/mlp/norm": "model.layers.{}.post_attention_layernorm",
                "norm": "model.norm",
            }
        ),
        **_matrices(
            {
                **{f"layers/attention/{name}": f"model.layers.{{}}.self_attn.{name}_proj" for name in "qkvo"},
                **{f"layers/mlp/{name}": f"model.layers.{{}}.mlp.{name}_proj" for name in ("gate", "up", "down")},
            }
        ),
        "layers/attention/q_norm": Lies("model.layers.{}.self_attn.q_norm.weight", "H"),
        "layers/attention/k_norm": Lies("model.layers.{}.self_attn.k_norm.weight", "H"),
        "head": Lies("lm_head.weight", "V D"),
    },
    idle=re.compile(r".*\.rotary_emb\.inv_freq"),
)


def _kin(read: Callable[[dict[str, Any]], Any]) -> Family:
    """A family whose tensors are called and lie as Llama's."""
    return Family(read, LLAMA.prefix, LLAMA.parameters, LLAMA.idle)


def _fused(name: str, matrix: str, bias: str) -> dict[str, Lies]:
    """Queries, keys and values, of as many heads each, in one matrix and in one bias, by the axes of the queries."""
    found = {}
    for part, letter in enumerate("qkv"):
        path, heads = f"layers/attention/{letter}", "N" if letter == "q" else "K"
        found[path] = Lies(f"{name}.weight", matrix.replace("N", heads), part)
        found[f"{path}_bias"] = Lies(f"{name}.bias", bias.replace("N", heads), part)
    return found


_NEOX = Family(
    read=_NeoX.model_validate,
    prefix="gpt_neox.",
    parameters={
        "embedding": Lies("gpt_neox.embed_in.weight", "V D"),
        **_norms(
            {
                "layers/attention/norm": "gpt_neox.layers.{}.input_layernorm",
                "layers/mlp/norm": "gpt_neox.layers.{}.post_attention_layernorm",
                "norm": "gpt_neox.final_layer_norm",
            }
        ),
        **_fused("gpt_neox.layers.{}.attention.query_key_value", "N3H D", "N3H"),
        **_matrices(
            {
                "layers/attention/o": "gpt_neox.layers.{}.attention.dense",
                "layers/mlp/up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
                "layers/mlp/down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
            }
        ),
        "head": Lies("embed_out.weight", "V D"),
    },
    idle=re.compile(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"),
)

_GPT_2 = Family(
    read=_GPT2.model_validate,
    prefix="transformer.",
    parameters={
        "embedding": Lies("transformer.wte.weight", "V D"),
        "positions": Lies("transformer.wpe.weight", "P D"),
        **_norms(
            {
                "layers/attention/norm": "transformer.h.{}.ln_1",
                "layers/mlp/norm": "transformer.h.{}.ln_2",
                "norm": "transformer.ln_f",
            }
        ),
        **_fused("transformer.h.{}.attn.c_attn", "D 3NH", "3NH"),
        **_matrices(
            {
                "layers/attention/o": "transformer.h.{}.attn.c_proj",
                "layers/mlp/up": "transformer.h.{}.mlp.c_fc",
                "layers/mlp/down": "transformer.h.{}.mlp.c_proj",
            },
            turned=True,
        ),
        "head": Lies("lm_head.weight", "V D"),
    },
    idle=re.compile(r".*\.attn\.(bias|masked_bias)"),
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": _kin(_Mistral.model_validate),
    "qwen2": _kin(_Qwen2.model_validate),
    "qwen3": _kin(_Qwen3.model_validate),
    "gpt_neox": _NEOX,
    "gpt2": _GPT_2,
}


def described(config: dict[str, Any]) -> tuple[Family, Description]:
    """The family that a config.json names, and its decoder.

    Raises:
      UserError: the family is not known here, or a field is missing, of the wrong type, or says what our decoder cannot do.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"model_type {kind!r} is not known here, expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    try:
        found: Description = family.read(config).description()
    except pydantic.ValidationError as error:
        raise UserError(problem(error)) from None
    dims(found.model, found.vocabulary)  # widths and heads fit
    return family, found
