"""The output of `python -m launch explain` for a setting, a group or a preset; imports neither Hydra nor torch."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from enum import Enum

from megatron_lite.config.changes import as_typed, on_resume
from megatron_lite.config.facts import facts_of
from megatron_lite.config.field_docs import field_docs, member_comments
from megatron_lite.config.keys import expects, get_value, is_group, is_map, leaf_keys, schema_keys, unknown_key
from megatron_lite.config.preset_folders import PresetFolders
from megatron_lite.config.presets import comment_of, defaults_of, values_of
from megatron_lite.config.schema import RunConfig

Row = tuple[str, str]
"""A label and its text."""


def explain(name: str, folders: PresetFolders) -> list[Row]:
    """The explanation of a name.

    Args:
        name: a dotted key, a group, or a preset as `model=gpt_tiny` or `model/gpt_tiny`; empty = all groups.
    Raises:
        ConfigError: nothing has that name; suggests the nearest one.
    """
    preset = name.replace("=", "/", 1)
    if not name:
        return list(_overview(folders))
    if "/" in preset and folders.file(preset) is not None:
        return list(_of_preset(preset, folders))
    key = name.rpartition(".")[0] if is_map(name.rpartition(".")[0]) else name.partition("=")[0]
    if key in schema_keys() and not is_group(key):
        return list(_of_key(key, folders))
    if key in schema_keys() or key in folders.groups():
        return list(_of_group(key, folders))
    raise unknown_key(key, also=folders.groups())


def _overview(folders: PresetFolders) -> Iterator[Row]:
    for group in dict.fromkeys([*(key for key in schema_keys() if "." not in key), *folders.groups()]):
        yield group, field_docs().get(group, "settings of several groups, as one preset")


def _of_group(group: str, folders: PresetFolders) -> Iterator[Row]:
    yield group, field_docs().get(group, "settings of several groups, as one preset")
    for key in leaf_keys():
        if key.startswith(f"{group}."):
            yield key, f"{_default(key)}: {field_docs().get(key, '')}"
    for name in folders.groups().get(group, []):
        yield f"{group}={name}", comment_of(folders, f"{group}/{name}")


def _of_preset(preset: str, folders: PresetFolders) -> Iterator[Row]:
    yield preset.replace("/", "="), comment_of(folders, preset)
    yield "file", folders.where(preset)
    yield from defaults_of(folders, preset).items()
    yield from values_of(folders, preset).items()


def _of_key(key: str, folders: PresetFolders) -> Iterator[Row]:
    yield key, field_docs().get(key, "")
    yield "type", expects(key)
    yield from _choices(key)
    facts = facts_of(key)
    if facts.range is not None:
        yield "range", str(facts.range)
    if facts.text is not None:
        yield "rule", " ".join((facts.text.__doc__ or "").split())
    yield "default", _default(key)
    grade, consequence = on_resume(key)
    yield "on resume", f"{grade}: {consequence}"
    yield from _presets_that_set(key, folders)


def _choices(key: str) -> Iterator[Row]:
    hint = schema_keys()[key]
    for kind in (hint, *typing.get_args(hint)):
        if isinstance(kind, type) and issubclass(kind, Enum):
            comments = member_comments(kind)
            if any(comments.values()):  # the type already lists the names
                yield from ((f"  {name}", comment) for name, comment in comments.items())


def _default(key: str) -> str:
    return as_typed(get_value(RunConfig(), key))


def _presets_that_set(key: str, folders: PresetFolders) -> Iterator[Row]:
    names = [f"{group}/{name}" for group, presets in folders.groups().items() for name in presets]
    for name in [*folders.scripts(), *names]:
        for found, value in values_of(folders, name).items():
            if found == key or found.startswith(f"{key}."):
                yield f"preset {name}", value if found == key else f"{found}={value}"
