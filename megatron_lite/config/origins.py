"""Where each value of a configuration comes from, for `--cfg job`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import OmegaConf

from megatron_lite.config.compose import Choice, merged_presets, typed
from megatron_lite.config.frozen import as_node
from megatron_lite.config.hf.start import with_weights
from megatron_lite.config.keys import get_value, leaf_keys
from megatron_lite.config.overrides import key_of
from megatron_lite.config.preset_folders import PresetFolders
from megatron_lite.config.presets import keys_of
from megatron_lite.config.schema import RunConfig

Origins = dict[str, str]
"""Dotted key -> `preset model/gpt_tiny`, `override`, `weights of model.init_from`, `default` or `derived`."""


def origins(choice: Choice, resolved: RunConfig) -> Origins:
    """The origin of each setting in the configuration that `choice` led to."""
    written = typed(choice)
    weighted = with_weights(written, choice.explicit)
    presets: Origins = {}
    for name, package in merged_presets(choice):
        label = _label(name, choice.folders)
        presets |= dict.fromkeys(keys_of(choice.folders, name, package), f"preset {label}")
    found: Origins = {}
    for key in leaf_keys():
        if get_value(resolved, key) != get_value(weighted, key):
            found[key] = "derived"
        elif get_value(weighted, key) != get_value(written, key):
            found[key] = "weights of model.init_from"
        elif _is_set(key, choice.explicit):
            found[key] = "override"
        else:
            found[key] = presets.get(key, "default")
    return found


def origins_of_frozen(frozen: RunConfig, overrides: Sequence[str], resolved: RunConfig) -> Origins:
    """The same for an earlier run's configuration with overrides."""
    explicit = {key_of(override) for override in overrides}
    found: Origins = {}
    for key in leaf_keys():
        changed = get_value(resolved, key) != get_value(frozen, key)
        found[key] = "override" if _is_set(key, explicit) else "derived" if changed else "frozen"
    return found


def _label(name: str, folders: PresetFolders) -> str:
    return f"{name} ({folders.where(name)})" if folders.is_own(name) else name


def _is_set(key: str, explicit: set[str]) -> bool:
    """Whether the user has set a value, or an entry of the map."""
    return key in explicit or any(typed_key.startswith(f"{key}.") for typed_key in explicit)


def annotated(config: RunConfig, found: Origins) -> Iterator[str]:
    """The configuration as YAML lines that `--config` accepts, with the origin of each value as a comment."""
    yield from _lines(config, as_node(config), found, "")


def _lines(group: Any, node: Any, found: Origins, prefix: str) -> Iterator[str]:
    indent = "  " * prefix.count(".")
    for field in fields(group):
        key, value = prefix + field.name, getattr(group, field.name)
        if is_dataclass(value):
            yield f"{indent}{field.name}:"
            yield from _lines(value, node[field.name], found, f"{key}.")
            continue
        text = OmegaConf.to_yaml(OmegaConf.create({field.name: node._get_node(field.name)}))
        first, *more = text.rstrip("\n").split("\n")
        if more and not isinstance(value, list | dict):  # a multi-line text cannot contain a comment
            yield f"{indent}# {found[key]}"
            yield f"{indent}{first}"
        else:
            yield f"{indent}{first}  # {found[key]}"
        yield from (f"{indent}{line}" for line in more)
