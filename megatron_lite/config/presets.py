"""Preset files: what each one sets, and checks for values that YAML would silently change.

YAML reads `dataset_config: 1.10` as the number 1.1, and `1:30` as 90; Hydra then converts that to text. A few lines of
aliases can expand beyond the memory.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from megatron_lite.config.keys import Shape, is_group, text_shape
from megatron_lite.config.preset_folders import PresetFolders, shown_path
from megatron_lite.errors import ConfigError, library_edge

NUMBER = re.compile(r"[-+]?[\d_.]+(?:e[-+]?\d+)?", re.IGNORECASE)  # also YAML 1.2's `12e5`
TEXT = "tag:yaml.org,2002:str"
NULL = "tag:yaml.org,2002:null"
GLOBAL = "# @package _global_"
LARGEST_BYTES = 2**20
FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # if PyYAML was built with libyaml


def check_preset(path: Path, group: str = "") -> None:
    """Refuse values that would not reach the configuration as they are written in the file.

    Args:
        group: of the preset; empty = the file holds full keys.
    Raises:
        ConfigError: it is not YAML, has aliases, or has unquoted texts that look like another type.
    """
    where = shown_path(path)
    with library_edge(ConfigError, f"{where} is not YAML", "correct it"):
        content = path.read_text(encoding="utf-8")
        if len(content) > LARGEST_BYTES:
            raise ConfigError(f"{where} has more than {LARGEST_BYTES} characters, and is not a preset; shorten it")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content, Loader=yaml.SafeLoader)):
            raise ConfigError(f"{where} has aliases (*NAME), which presets may not; write the values out")
        node = yaml.compose(content, Loader=yaml.SafeLoader)
    prefix = "" if _is_global(content) else group
    problems = [
        f"{where}: {key}: {value} is read by YAML as something else than this text; quote it: '{value}'"
        for key, value in _misread(prefix, node)
    ]
    if problems:
        raise ConfigError(problems)


def values_of(folders: PresetFolders, name: str) -> dict[str, str]:
    """Dotted key -> value as written, for everything that a preset (`model/gpt_tiny`) or primary configuration sets.

    Raises:
        ConfigError: it is not YAML.
    """
    content = _content(folders, name)
    with library_edge(ConfigError, f"{folders.where(name)} is not YAML", "correct it"):
        root = yaml.compose(content, Loader=FAST_LOADER)
    group = name.rpartition("/")[0]
    return {
        key: content[node.start_mark.index : node.end_mark.index].strip()
        for key, node in _values("" if _is_global(content) else group, root)
    }


def keys_of(folders: PresetFolders, name: str, package: str) -> list[str]:
    """The dotted keys that a file sets when merged into a package; an empty package means `_global_`."""
    own = name.rpartition("/")[0]
    keys = values_of(folders, name)
    if not own or package == own:
        return list(keys)
    return [".".join(filter(None, (package, key.removeprefix(f"{own}.")))) for key in keys]


def defaults_of(folders: PresetFolders, name: str) -> dict[str, str]:
    """Group -> preset, from the defaults list of an experiment or a primary configuration.

    Raises:
        ConfigError: it is not YAML.
    """
    content = _content(folders, name)
    with library_edge(ConfigError, f"{folders.where(name)} is not YAML", "correct it"):
        entries = (yaml.safe_load(content) or {}).get("defaults", [])
        chosen = [pair for entry in entries if isinstance(entry, dict) for pair in entry.items()]
        return {group.removeprefix("override /"): str(preset) for group, preset in chosen if preset is not None}


def comment_of(folders: PresetFolders, name: str) -> str:
    """The comment at the top of a preset.

    Raises:
        ConfigError: the file cannot be read.
    """
    comments = itertools.takewhile(lambda line: line.startswith("#"), _content(folders, name).splitlines())
    return " ".join(line.lstrip("# ") for line in comments if GLOBAL not in line)


def _content(folders: PresetFolders, name: str) -> str:
    file = folders.file(name)
    assert file is not None, f"there is no preset {name}"
    with library_edge(ConfigError, f"{folders.where(name)} cannot be read", "write it in UTF-8"):
        return file.read_text(encoding="utf-8")


def _is_global(content: str) -> bool:
    return GLOBAL in content.partition("\n")[0]


def _values(key: str, node: yaml.Node | None) -> Iterator[tuple[str, yaml.Node]]:
    """The settings below a key; a map with user-defined names is one setting."""
    if isinstance(node, yaml.MappingNode) and (not key or is_group(key)):
        for name, value in node.value:
            inner = f"{key}.{name.value}" if key else str(name.value)
            if inner != "defaults" and name.value != "defaults":
                yield from _values(inner, value)
    elif node is not None and key:
        yield key, node


def _misread(key: str, node: yaml.Node | None) -> Iterator[tuple[str, str]]:
    """(dotted key, value) of texts that YAML reads as another type."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _misread(f"{key}.{name.value}" if key else str(name.value), value)
    elif isinstance(node, yaml.SequenceNode):
        if text_shape(key) in (Shape.texts, Shape.text_or_texts):
            for entry in node.value:
                yield from _misread(key, entry)
    elif isinstance(node, yaml.ScalarNode) and text_shape(key) and node.style is None and _is_changed(node):
        yield key, node.value


def _is_changed(plain: yaml.ScalarNode) -> bool:
    return plain.tag != NULL and (plain.tag != TEXT or NUMBER.fullmatch(plain.value) is not None)
