"""Reads our settings from a config.json of transformers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_lite.config.derived import fill_in_model
from megatron_lite.config.hf.families import FAMILIES, counterpart, model_types
from megatron_lite.config.hf.family import DECISIVE, Family, NoCounterpart
from megatron_lite.config.hf.known_keys import OF_OTHER_FAMILIES
from megatron_lite.config.hf.reader import SUCH, ConfigReader, shown_value
from megatron_lite.config.keys import as_word
from megatron_lite.config.schema import ModelConfig
from megatron_lite.errors import ConfigError


@dataclass(frozen=True)
class Described:
    """The content of a config.json."""

    family: Family
    settings: dict[str, Any]
    """Fields of ModelConfig: those that affect the logits, dropouts, and `family` where the settings do not show it."""


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
    reader = ConfigReader(config, where)
    family = _family(reader)
    reader.use_aliases(family.aliases)
    settings = {name: getattr(ModelConfig(), name) for name in DECISIVE}
    settings |= {name: values[0] for name, values in family.fixed.items() if len(values) == 1}
    for key, entry in family.keys.items():
        value = reader.value(key, entry.default, entry.least)
        settings |= dict.fromkeys(entry.fields, value)
        for name in entry.fields:
            supported = family.fixed.get(name)
            if supported is not None and value not in supported:
                reader.refuse(key, value, " or ".join(map(as_word, supported)))
            if names and name in ("num_layers", "num_decoder_layers") and (value or 0) > len(names):
                reader.refuse(key, value, f"no more layers than the {len(names)} tensors of the files make")
    settings["vocab_size"] = reader.value("vocab_size", family.vocab_size)
    word = reader.choice(family.activation_key, family.default_activation, tuple(family.activations))
    settings["activation"] = family.activations[word]
    for key, supported in family.demands.items():
        reader.choice(key, family.absent.get(key, supported[0]), supported)
    for part in family.parts:
        settings |= part.read(reader, settings, names)
    _refuse_unknown(reader, family, but_of_other_families=unknown_keys)
    if not reader.problems:
        reader.problems += _other_reasons(settings, family, where)
    if reader.problems:
        raise ConfigError(reader.problems)
    settings["family"] = _family_to_name(settings, family)
    return Described(family, settings)


def _other_reasons(settings: Mapping[str, Any], family: Family, where: str) -> Iterator[str]:
    """Why transformers has no model with these settings, although each key has a valid value."""
    try:
        counterpart(_filled_in(settings, family.model_type))
    except NoCounterpart as reason:
        keys = {field: key for key, entry in family.keys.items() for field in entry.fields}
        said = re.sub(r"model\.(\w+)", lambda found: keys.get(found[1], found[0]), str(reason))
        yield f"{where} describes a model that we cannot begin with: {said}; {SUCH}"


def _family_to_name(settings: Mapping[str, Any], family: Family) -> str | None:
    """The model type, unless it is the one that these settings have anyway."""
    try:
        usual = counterpart(_filled_in(settings, None))
    except NoCounterpart:  # only a family that has to be named computes this
        return family.model_type
    return None if usual.model_type == family.model_type else family.model_type


def _filled_in(settings: Mapping[str, Any], model_type: str | None) -> ModelConfig:
    return fill_in_model(replace(ModelConfig(), **{**settings, "family": model_type}))


def _refuse_unknown(reader: ConfigReader, family: Family, *, but_of_other_families: bool) -> None:
    """Refuse keys that may change what the model computes.

    null, false, 0 and empty values mean that a feature is unused, unless the key itself indicates another family.

    Args:
        but_of_other_families: refuse only keys of other families: transformers ignores them, so comparing logits
            would not reveal them.
    """
    kind = family.model_type
    for key, found in reader.config.items():
        if family.knows_key(key):
            continue
        said = f"{reader.where}: {key}={shown_value(found)} is a key"
        if key in OF_OTHER_FAMILIES:
            reader.problems.append(
                f"{said} of other families than model_type={kind}, which may compute something else from the same "
                "tensors; give the folder with the config.json that was saved with it"
            )
        elif found and not but_of_other_families:
            reader.problems.append(
                f"{said} that we do not know for model_type={kind}, and it may change what the model computes; "
                "give the config.json that was saved with the weights, or set model.check_init=always, which "
                "takes the key and compares logits with those of transformers"
            )


def _family(reader: ConfigReader) -> Family:
    """The family of a config.json.

    Raises:
        ConfigError: none of our families, or two: the file's model type and its class belong to different families.
    """
    found = reader.config.get("model_type")
    same_type = [family for family in FAMILIES if family.model_type == found]
    if not same_type:
        raise ConfigError(
            f"{reader.where}: model_type={shown_value(found)} is not supported; supported: "
            f"{', '.join(model_types())}; {SUCH}"
        )
    known, named = same_type[0].architectures, reader.config.get("architectures") or []
    if not isinstance(named, list) or not all(name in known for name in named):
        raise ConfigError(
            f"{reader.where}: architectures={shown_value(named)} contradicts model_type={found}, of which we know "
            f"{', '.join(known)}; give the folder of such a model with a config.json of its own"
        )
    return next((family for family in same_type if family.architecture in named), same_type[0])
