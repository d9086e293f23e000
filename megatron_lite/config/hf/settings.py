"""The settings of ours that a config.json of transformers describes."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron_lite.config.hf.families import BART, FAMILIES, LLAMA, ROBERTA, T5, Family
from megatron_lite.config.hf.translation import WORDS
from megatron_lite.config.keys import as_word, nearest
from megatron_lite.config.schema import ModelConfig
from megatron_lite.errors import ConfigError

_OF_TRAINING = ("name", "init_from", "vocab_pad_multiple", "init", "init_std")
DECISIVE = tuple(
    field.name
    for field in fields(ModelConfig)
    if field.name not in _OF_TRAINING and not field.name.endswith("_dropout")
)
"""Fields of ModelConfig on which the logits depend: sizes and forms, not how training begins."""


@dataclass(frozen=True)
class Described:
    """What a config.json says."""

    family: Family
    settings: dict[str, Any]
    """Fields of ModelConfig: the decisive ones, and dropouts."""


def settings_of(config: Mapping[str, Any], *, names: Container[str] = (), where: str = "config.json") -> Described:
    """
    Args:
        names: of the tensors beside it. They tell whether T5 v1.1 has a head of its own: transformers 5 writes that its
            embeddings are tied whether they are or not.
        where: the file, for messages.
    Raises:
        ConfigError: naming each key whose value we do not compute, the value and those that we do.
    """
    reader = _Reader(config, where)
    family = _family(reader)
    words = WORDS[family.model_type]
    settings = {name: getattr(ModelConfig(), name) for name in DECISIVE}
    settings |= {name: values[0] for name, values in family.fixed.items() if len(values) == 1}
    for key, entry in words.keys.items():
        value = reader.value(key, entry.default)
        settings |= dict.fromkeys(entry.fields, value)
    settings["vocab_size"] = reader.value("vocab_size", _VOCABULARIES[family.model_type])
    word = reader.choice(words.activation_key, words.default_activation, tuple(words.activations))
    settings["activation"] = words.activations.get(word)
    for key, supported in words.demands.items():
        reader.choice(key, supported[0], supported)
    if family.model_type in _SPECIAL:
        settings |= _SPECIAL[family.model_type](reader, settings, names)
    if reader.problems:
        raise ConfigError(reader.problems)
    return Described(family, settings)


_VOCABULARIES = {"gpt2": 50257, "llama": 32000, "bert": 30522, "roberta": 50265, "t5": 32128, "bart": 50265}


class _Reader:
    """Values of a config.json, and what is wrong with them."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where
        self.problems: list[str] = []

    def value(self, key: str, default: Any) -> Any:
        """A switch, an integer or a number, as the default is; null or missing is the default."""
        found = self.config.get(key)
        if found is None:
            return default
        kinds: tuple[type, ...]
        if isinstance(default, bool):
            kinds, wanted = (bool,), "true or false"
        elif isinstance(default, float):
            kinds, wanted = (int, float), "a number"
        else:
            kinds, wanted = (int,), "an integer"
        if not isinstance(found, kinds) or isinstance(found, bool) is not isinstance(default, bool):
            self.refuse(key, found, wanted)
            return default
        return float(found) if isinstance(default, float) else found

    def choice(self, key: str, default: Any, supported: tuple[Any, ...]) -> Any:
        found = self.config.get(key, default)
        if found not in supported:
            self.refuse(key, found, " or ".join(dict.fromkeys(map(as_word, supported))))
        return found

    def refuse(self, key: str, found: Any, supported: str) -> None:
        self.problems.append(f"{self.where}: {key}={as_word(found)} is not supported; supported: {supported}")


def _family(reader: _Reader) -> Family:
    found = reader.config.get("model_type")
    types = list(WORDS)
    if found not in types:
        guess = nearest(str(found), types)
        near = f"; the nearest is {guess}" if guess else ""
        raise ConfigError(
            f"{reader.where}: model_type={as_word(found)} is not supported; supported: {', '.join(types)}{near}"
        )
    same_type = [family for family in FAMILIES if family.model_type == found]
    architectures = reader.config.get("architectures") or []
    return next((family for family in same_type if family.architecture in architectures), same_type[0])


def _llama(reader: _Reader, settings: dict[str, Any], names: Container[str]) -> dict[str, Any]:
    """The base of its rotary positions, under its old and its new key."""
    rope = reader.config.get("rope_parameters") or {}
    scaling = reader.config.get("rope_scaling") or {}
    for key, spec in (("rope_parameters", rope), ("rope_scaling", scaling)):
        if not isinstance(spec, Mapping):
            reader.refuse(key, spec, "null")
            return {}
        kind = spec.get("rope_type", spec.get("type", "default"))
        if kind != "default":
            reader.refuse(f"{key}.rope_type", kind, "default, positions without scaling")
        if spec.get("partial_rotary_factor", 1.0) != 1.0:
            reader.refuse(f"{key}.partial_rotary_factor", spec["partial_rotary_factor"], "1")
    base = rope.get("rope_theta", scaling.get("rope_theta"))
    return {"rotary_base": float(base) if base is not None else reader.value("rope_theta", 10000.0)}


def _roberta(reader: _Reader, settings: dict[str, Any], names: Container[str]) -> dict[str, Any]:
    """Its positions begin behind the id of the padding token."""
    offset = 1 + reader.value("pad_token_id", 1)
    return {
        "position_offset": offset,
        "max_position_embeddings": settings["max_position_embeddings"] - offset,
    }


def _t5(reader: _Reader, settings: dict[str, Any], names: Container[str]) -> dict[str, Any]:
    """Its head: scaled as in v1.0, or as in v1.1, where the files tell whether it is tied."""
    tied = reader.value("tie_word_embeddings", True)
    scaled = reader.value("scale_decoder_outputs", tied)
    if scaled and not tied:
        reader.refuse("scale_decoder_outputs", scaled, "false where tie_word_embeddings=false")
    return {"tie_embeddings": tied and (scaled or "lm_head.weight" not in names), "scale_tied_head": scaled}


def _bart(reader: _Reader, settings: dict[str, Any], names: Container[str]) -> dict[str, Any]:
    """Both stacks have to be of one width."""
    for kind, default in (("attention_heads", 16), ("ffn_dim", 4096)):
        encoder, decoder = (reader.value(f"{stack}_{kind}", default) for stack in ("encoder", "decoder"))
        if encoder != decoder:
            reader.refuse(f"decoder_{kind}", decoder, f"encoder_{kind}={encoder}")
    return {}


_SPECIAL: dict[str, Callable[[_Reader, dict[str, Any], Container[str]], dict[str, Any]]] = {
    LLAMA.model_type: _llama,
    ROBERTA.model_type: _roberta,
    T5.model_type: _t5,
    BART.model_type: _bart,
}
