"""Reads our settings from a config.json of transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_lite.config.derived import fill_in_model
from megatron_lite.config.hf.families import (
    BART,
    DECISIVE,
    FAMILIES,
    LLAMA,
    ROBERTA,
    T5,
    Family,
    NoCounterpart,
    counterpart,
)
from megatron_lite.config.hf.translation import OF_OTHER_FAMILIES, WORDS, Words
from megatron_lite.config.keys import as_word
from megatron_lite.config.schema import ModelConfig
from megatron_lite.errors import ConfigError


@dataclass(frozen=True)
class Described:
    """The content of a config.json."""

    family: Family
    settings: dict[str, Any]
    """Fields of ModelConfig: those that affect the logits, and dropouts."""


def settings_of(
    config: Mapping[str, Any],
    *,
    names: Collection[str] = (),
    where: str = "config.json",
    unknown_keys: bool = False,
) -> Described:
    """Read a config.json.

    Args:
        names: tensors next to it. They show whether T5 v1.1 has an untied head: transformers 5 always writes that its
            embeddings are tied.
        where: the file, for messages.
        unknown_keys: accept keys with unknown effect, because logits will be compared.
    Raises:
        ConfigError: lists each key whose value we do not support, with the value and the supported ones.
    """
    reader = _Reader(config, where)
    family = _family(reader)
    words = WORDS[family.model_type]
    reader.use_aliases(words.aliases)
    settings = {name: getattr(ModelConfig(), name) for name in DECISIVE}
    settings |= {name: values[0] for name, values in family.fixed.items() if len(values) == 1}
    for key, entry in words.keys.items():
        value = reader.value(key, entry.default, entry.least)
        settings |= dict.fromkeys(entry.fields, value)
        for name in entry.fields:
            supported = family.fixed.get(name)
            if supported is not None and value not in supported:
                reader.refuse(key, value, " or ".join(map(as_word, supported)))
            if names and name in ("num_layers", "num_decoder_layers") and (value or 0) > len(names):
                reader.refuse(key, value, f"no more layers than the {len(names)} tensors of the files make")
    settings["vocab_size"] = reader.value("vocab_size", _VOCABULARIES[family.model_type])
    word = reader.choice(words.activation_key, words.default_activation, tuple(words.activations))
    settings["activation"] = words.activations[word]
    for key, supported in words.demands.items():
        reader.choice(key, supported[0], supported)
    if family.model_type in _SPECIAL:
        settings |= _SPECIAL[family.model_type](reader, settings, names)
    reader.refuse_unknown(words, but_of_other_families=unknown_keys)
    if not reader.problems:
        reader.problems += _other_reasons(settings, words, where)
    if reader.problems:
        raise ConfigError(reader.problems)
    return Described(family, settings)


def _other_reasons(settings: Mapping[str, Any], words: Words, where: str) -> Iterator[str]:
    """Why transformers has no model with these settings, although each key has a valid value."""
    try:
        counterpart(fill_in_model(replace(ModelConfig(), **settings)))
    except NoCounterpart as reason:
        keys = {field: key for key, entry in words.keys.items() for field in entry.fields}
        said = re.sub(r"model\.(\w+)", lambda found: keys.get(found[1], found[0]), str(reason))
        yield f"{where} describes a model that we cannot begin with: {said}; {SUCH}"


_ROTARY_BASE = 10000.0
SUCH = "give the folder of such a model"
"""Not: change config.json, which then would no longer describe the weights."""
_OF_DEFAULT_POSITIONS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"}
_SHOWN_CHARACTERS = 200
_VOCABULARIES = {"gpt2": 50257, "llama": 32000, "bert": 30522, "roberta": 50265, "t5": 32128, "bart": 50265}


class _Reader:
    """Reads values from a config.json, and collects problems."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where
        self.problems: list[str] = []

    def use_aliases(self, aliases: Mapping[str, str]) -> None:
        """Resolve aliases of keys, as transformers does; a key whose two names have different values is refused."""
        for alias, key in aliases.items():
            if alias not in self.config:
                continue
            said = self.config[alias]
            if key in self.config and self.config[key] != said:
                self.refuse(alias, said, f"what {key}={as_word(self.config[key])} says, another name of the same")
            self.config = {**self.config, key: said}

    def value(self, key: str, default: Any, least: int = 1) -> Any:
        """A bool, an int or a float, as the default is; the default if missing."""
        return self.typed(key, self.config[key], default, least) if key in self.config else default

    def typed(self, key: str, found: Any, default: Any, least: int = 1) -> Any:
        """Like `value`, for a given value. null is valid only where the default is a number that may mean "none"."""
        if found is None and not default and not isinstance(default, bool):
            return default
        kinds: tuple[type, ...]
        if isinstance(default, bool):
            kinds, wanted = (bool,), "true or false"
        elif isinstance(default, float):
            kinds, wanted = (int, float), "a number >= 0"
        else:
            kinds, wanted = (int,), f"an integer >= {least}"
        right = isinstance(found, kinds) and isinstance(found, bool) is isinstance(default, bool)
        if not right or (not isinstance(default, bool) and not (0 if isinstance(default, float) else least) <= found):
            self.refuse(key, found, wanted)
            return default
        return float(found) if isinstance(default, float) else found

    def choice(self, key: str, default: Any, supported: tuple[Any, ...]) -> Any:
        found = self.config.get(key, default)
        if found is None and not default:
            return default
        if found not in supported:
            self.refuse(key, found, " or ".join(dict.fromkeys(map(as_word, supported))))
            return default
        return found

    def refuse(self, key: str, found: Any, supported: str) -> None:
        self.problems.append(f"{self.where}: {key}={_shown(found)} is not supported; supported: {supported}; {SUCH}")

    def refuse_unknown(self, words: Words, *, but_of_other_families: bool) -> None:
        """Refuse keys that may change what the model computes.

        null, false, 0 and empty values mean that a feature is unused, unless the key itself indicates another family.

        Args:
            but_of_other_families: refuse only keys of other families: transformers ignores them, so comparing logits
                would not reveal them.
        """
        kind = self.config["model_type"]
        for key, found in self.config.items():
            if words.knows(key):
                continue
            said = f"{self.where}: {key}={_shown(found)} is a key"
            if key in OF_OTHER_FAMILIES:
                self.problems.append(
                    f"{said} of other families than model_type={kind}, which may compute something else from the same "
                    "tensors; give the folder with the config.json that was saved with it"
                )
            elif found and not but_of_other_families:
                self.problems.append(
                    f"{said} that we do not know for model_type={kind}, and it may change what the model computes; "
                    "give the config.json that was saved with the weights, or set model.check_init=always, which "
                    "takes the key and compares logits with those of transformers"
                )


def _shown(value: Any) -> str:
    text = as_word(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _family(reader: _Reader) -> Family:
    """The family of a config.json.

    Raises:
        ConfigError: none of our families, or two: the file's model type and its class belong to different families.
    """
    found = reader.config.get("model_type")
    if found not in list(WORDS):
        raise ConfigError(
            f"{reader.where}: model_type={_shown(found)} is not supported; supported: {', '.join(WORDS)}; {SUCH}"
        )
    known, named = WORDS[found].architectures, reader.config.get("architectures") or []
    if not isinstance(named, list) or not all(name in known for name in named):
        raise ConfigError(
            f"{reader.where}: architectures={_shown(named)} contradicts model_type={found}, of which we know "
            f"{', '.join(known)}; give the folder of such a model with a config.json of its own"
        )
    same_type = [family for family in FAMILIES if family.model_type == found]
    return next((family for family in same_type if family.architecture in named), same_type[0])


def _llama(reader: _Reader, settings: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The base of the rotary positions, from its old and its new key."""
    bases = {}
    for key in ("rope_parameters", "rope_scaling"):
        spec = reader.config.get(key) or {}
        if not isinstance(spec, Mapping):
            reader.refuse(key, spec, "null")
            continue
        kind = spec.get("rope_type", spec.get("type", "default"))
        if kind != "default":
            reader.refuse(f"{key}.rope_type", kind, "default, positions without scaling")
        if spec.get("partial_rotary_factor", 1.0) != 1.0:
            reader.refuse(f"{key}.partial_rotary_factor", spec["partial_rotary_factor"], "1")
        if spec.get("rope_theta") is not None:
            bases[f"{key}.rope_theta"] = reader.typed(f"{key}.rope_theta", spec["rope_theta"], _ROTARY_BASE)
        for unknown in sorted(spec.keys() - _OF_DEFAULT_POSITIONS):
            reader.refuse(f"{key}.{unknown}", spec[unknown], "positions without scaling, the same in all layers")
    if "rope_theta" in reader.config:
        bases["rope_theta"] = reader.value("rope_theta", _ROTARY_BASE)
    (first, base), *others = bases.items() or [("rope_theta", _ROTARY_BASE)]
    for key, other in others:
        if other != base:
            reader.refuse(key, other, f"what {first}={as_word(base)} says, another name of the same")
    return {"rotary_base": base}


def _roberta(reader: _Reader, settings: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """RoBERTa's positions start after the padding token's ID."""
    offset = 1 + reader.value("pad_token_id", 1, least=0)
    rows = settings["max_position_embeddings"]
    if rows <= offset:
        reader.refuse("max_position_embeddings", rows, f"more than pad_token_id + 1 = {offset}, the unused ones")
    return {"position_offset": offset, "max_position_embeddings": rows - offset}


def _t5(reader: _Reader, settings: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The head: scaled as in v1.0, or as in v1.1, where the tensor names show whether it is tied."""
    tied = reader.value("tie_word_embeddings", True)
    scaled = reader.value("scale_decoder_outputs", tied)
    if scaled and not tied:
        reader.refuse("scale_decoder_outputs", scaled, "false where tie_word_embeddings=false")
    word = str(reader.config.get("feed_forward_proj", "relu"))
    activation = "gelu_new" if word == "gated-gelu" else word.removeprefix("gated-")
    for key, derived in (("dense_act_fn", activation), ("is_gated_act", word.startswith("gated-"))):
        if reader.config.get(key, derived) != derived:
            reader.refuse(key, reader.config[key], f"what feed_forward_proj={word} says: {as_word(derived)}")
    return {"tie_embeddings": tied and (scaled or "lm_head.weight" not in names), "scale_tied_head": scaled}


def _bart(reader: _Reader, settings: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Check that both stacks have the same width."""
    for kind, default in (("attention_heads", 16), ("ffn_dim", 4096)):
        encoder, decoder = (reader.value(f"{stack}_{kind}", default) for stack in ("encoder", "decoder"))
        if encoder != decoder:
            reader.refuse(f"decoder_{kind}", decoder, f"encoder_{kind}={encoder}")
    return {}


_SPECIAL: dict[str, Callable[[_Reader, dict[str, Any], Collection[str]], dict[str, Any]]] = {
    LLAMA.model_type: _llama,
    ROBERTA.model_type: _roberta,
    T5.model_type: _t5,
    BART.model_type: _bart,
}
