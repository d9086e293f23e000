"""`Family`: all that makes a model type of transformers, as one record. The files beside this one hold the records."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

from megatron_lite.config.hf.known_keys import HARMLESS, HARMLESS_BEGINNINGS
from megatron_lite.config.hf.reader import ConfigReader
from megatron_lite.config.hf.tensors import Tensors
from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.config.schema import Activation, Architecture, ModelConfig, PositionEmbedding


class NoCounterpart(Exception):  # noqa: N818 - a result rather than an error: such a model is saved with our own names
    """transformers has no model with these settings; the text says why."""


class TokenRoles(Protocol):
    """IDs of tokens with a role, such as `data.special.SpecialTokens`; None = there is no such token."""

    @property
    def eod(self) -> int | None: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def cls(self) -> int | None: ...
    @property
    def sep(self) -> int | None: ...
    @property
    def pad(self) -> int | None: ...


@dataclass(frozen=True)
class Key:
    """A key of config.json whose value has the same form as ours."""

    fields: tuple[str, ...]
    """Fields of ModelConfig. The first one is written; all are read."""
    default: Any
    """What transformers assumes if the key is missing."""
    least: int = 1
    """Smallest value of an integer."""


@dataclass(frozen=True)
class Part:
    """Keys of config.json that no table expresses, with the functions that read and write them."""

    keys: frozenset[str]
    fields: tuple[str, ...]
    """Fields of ModelConfig that `read` returns."""
    read: Callable[[ConfigReader, Mapping[str, Any], Collection[str]], dict[str, Any]]
    """(reader, settings so far, names of the tensors beside config.json) -> settings."""
    write: Callable[[ResolvedModel, TokenRoles], dict[str, Any]]
    """Raises NoCounterpart if transformers has no model with these settings and tokens."""


SCRIPTS = {
    Architecture.decoder: "pretrain_gpt",
    Architecture.encoder: "pretrain_bert",
    Architecture.encoder_decoder: "pretrain_t5",
}
_TOKEN_KEYS = {
    Architecture.decoder: ("bos_token_id", "eos_token_id", "pad_token_id"),
    Architecture.encoder: ("pad_token_id",),
    Architecture.encoder_decoder: ("eos_token_id", "pad_token_id", "decoder_start_token_id"),
}
"""Token IDs that each config.json must have: for a missing one transformers assumes an ID of the published model."""
_USED_BY_ALL = (
    "architecture", "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "max_position_embeddings",
    "normalization", "norm_placement", "norm_epsilon", "position_embedding", "attention_bias", "attention_scale",
    "mlp_bias", "tie_embeddings",
)  # fmt: skip
"""Fields that every model uses, so that a family must fix or read them."""
REMOVED = object()
_ROLES = ("eod", "bos", "eos", "cls", "sep", "pad")
_DERIVED = ("activation", "vocab_size")  # read from keys that every family has
# Fields that are compared with the head count where no key holds them.
_OF_HEADS = ("num_query_groups", "head_size")


@dataclass(frozen=True)
class Family:
    """A kind of model, in transformers' terms and in our settings.

    Dropouts and initialisation do not matter here: a trained model does not use them.
    """

    model_type: str
    architecture: str
    """The class of transformers that config.json names."""
    architectures: tuple[str, ...]
    """transformers' classes of this model type whose weights we can load, including those without a head."""

    fixed: Mapping[str, tuple[Any, ...]]
    """Fields of ModelConfig that no key holds -> the values that the family supports. A field that is neither fixed nor
    in `keys` or `parts`, such as one that is new here, must have its default, which means that it is not used."""
    keys: Mapping[str, Key]
    """Keys of config.json that hold a setting."""
    activation_key: str
    activations: Mapping[str, Activation]
    """The first name for one of our activations is the one that is written."""
    default_activation: str
    vocab_size: int
    """What transformers assumes if config.json has none."""
    tokens: Mapping[str, tuple[str, ...]]
    """Key of config.json -> roles of the token that it names, as the tokenizer beside the weights and our objectives
    use it: the first role that has a token."""
    tensors: Tensors
    """Modules of ours -> their places in the files; see `tensors.py`."""

    parts: tuple[Part, ...] = ()
    demands: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys that change the computation -> the values that we support; the first one is that of a missing key, unless
    `absent` has another one."""
    absent: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `demands` -> what transformers assumes if they are missing, where we do not support it."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Keys that are written as they are."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names that transformers accepts for a key."""
    harmless: frozenset[str] = frozenset()
    """Additional keys in the family's files that do not affect the logits."""
    nonzero: Mapping[str, str] = field(default_factory=dict)
    """Fields that must not be 0 -> what the family always has, in words."""
    next_sentence: bool = False
    """The class also classifies pairs."""
    only_if_named: bool = False
    """Computes the same as an earlier family, so that only `model.family` tells them apart."""
    heads_divide_hidden: bool = False
    """transformers refuses a hidden_size that num_attention_heads does not divide, also with a head size of its own."""

    zeros: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    """Tensors that the class needs and we do not have, stored as zeros -> shape; `vocab_size` stands for that size."""
    copies: tuple[str, ...] = ()
    """Further names under which files may hold the word embedding."""
    ignored: str = ""
    """Regular expression: buffers that follow from the settings, and parts that the class does not use."""
    foreign_tokenizers: tuple[str, ...] = ()
    """Prefixes of tokenizer classes that belong to models with the same tensors but another function."""
    doubtful: Mapping[Activation, str] = field(default_factory=dict)
    """Activations that no published model has -> the family that may be there under this name, as a sentence."""

    @classmethod
    def like(cls, other: Family, **changes: Any) -> Family:
        """A family that differs from another one by `changes`.

        A mapping is merged into the one of `other`, where REMOVED leaves an entry out; any other value replaces it.
        """
        return replace(other, **{name: _merged(getattr(other, name), value) for name, value in changes.items()})

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ValueError(f"the family {self.model_type}: {'; '.join(problems)}")

    @property
    def kind(self) -> Architecture:
        found: Architecture = self.fixed["architecture"][0]
        return found

    @property
    def script(self) -> str:
        """The entry script that trains such models."""
        return SCRIPTS[self.kind]

    @property
    def body(self) -> str:
        """Prefix of tensors that files of the class without a head lack; empty if they have the same names."""
        before, dot, _ = self.tensors["embedding"].names[0].partition(".")
        return before + dot if dot else ""

    @property
    def held(self) -> set[str]:
        """Fields of ModelConfig that its config.json holds."""
        of_keys = {name for key in self.keys.values() for name in key.fields}
        return {*of_keys, *(name for part in self.parts for name in part.fields), *_DERIVED}

    def knows_field(self, name: str) -> bool:
        return name in self.fixed or name in self.held or name in _OF_HEADS

    def knows_key(self, key: str) -> bool:
        """Whether we know how a key of config.json affects the logits, if at all."""
        read = key in self.keys or key in self.demands or key in self.aliases or key == self.activation_key
        read = read or any(key in part.keys for part in self.parts)
        return read or key in self.harmless or key in HARMLESS or key.startswith(HARMLESS_BEGINNINGS)

    def _problems(self) -> Iterator[str]:
        """What is wrong with the record, each with what to write."""
        names = {one.name for one in fields(ModelConfig)}
        if wrong := sorted((set(self.fixed) | self.held | set(self.nonzero)) - names):
            yield f"{', '.join(wrong)} is no field of ModelConfig; correct the name"
        if len(self.fixed.get("architecture", ())) != 1:
            yield "name its one Architecture in `fixed`"
            return
        open_fields = [name for name in _USED_BY_ALL if not self.knows_field(name)]
        if self.kind is Architecture.encoder_decoder and not self.knows_field("num_decoder_layers"):
            open_fields.append("num_decoder_layers")
        if PositionEmbedding.rotary in self.fixed.get("position_embedding", ()) and not self.knows_field("rotary_base"):
            open_fields.append("rotary_base")
        if open_fields:
            yield (
                f"nothing is said of {', '.join(open_fields)}, which every such model uses; add it to `keys` (a key of "
                "config.json holds it), to `fixed` (it always has the same value), or to the fields of one of `parts`"
            )
        if lost := [key for key in _TOKEN_KEYS[self.kind] if key not in self.tokens]:
            yield f"no token is named for {', '.join(lost)} of config.json; add it to `tokens` with its roles"
        if odd := sorted({role for roles in self.tokens.values() for role in roles} - set(_ROLES)):
            yield f"{', '.join(odd)} in `tokens` is no role; use {', '.join(_ROLES)}"
        if lost := [name for name in ("embedding", "head") if name not in self.tensors]:
            yield f"{', '.join(lost)} has no place; add it to `tensors`"
        if lost := sorted(set(self.absent) - set(self.demands)):
            yield f"{', '.join(lost)} is in `absent` only; add the supported values to `demands`"


def _merged(before: Any, change: Any) -> Any:
    if not isinstance(before, Mapping):
        return change
    return {key: value for key, value in {**before, **change}.items() if value is not REMOVED}


def keys(**rows: tuple[str | tuple[str, ...], Any] | tuple[str, Any, int]) -> dict[str, Key]:
    """Key of config.json = (field or fields, default), or (field, default, least value)."""
    return {key: Key((names,) if isinstance(names, str) else names, *rest) for key, (names, *rest) in rows.items()}


_OF_TRAINING = ("name", "init_from", "check_init", "family", "vocab_pad_multiple", "init", "init_std")


def decisive_fields(model: type[ModelConfig] = ModelConfig) -> Iterator[tuple[str, Any]]:
    """Fields that affect the logits (sizes and forms, not how training begins), and their defaults."""
    for one in fields(model):
        if one.name not in _OF_TRAINING and not one.name.endswith("_dropout"):
            yield one.name, one.default


DECISIVE = tuple(name for name, _ in decisive_fields())
