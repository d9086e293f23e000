"""What YAML would change without a word in the presets that a run has chosen.

YAML reads `dataset_config: 1.10` as the number 1.1, and `1:30` as 90; Hydra then makes a text of that. A few lines of
aliases can stand for more than memory holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from megatron_lite.config.keys import Shape, text_shape
from megatron_lite.errors import ConfigError, library_edge

NUMBER = re.compile(r"[-+]?[\d_.]+(?:e[-+]?\d+)?", re.IGNORECASE)  # YAML 1.2's `12e5`, too
TEXT = "tag:yaml.org,2002:str"
NULL = "tag:yaml.org,2002:null"
GLOBAL = "# @package _global_"
LARGEST_BYTES = 2**20


def check_preset(path: Path, group: str = "") -> None:
    """Refuse what would not be in the configuration as it stands in the file.

    Args:
        group: the preset's; empty = the file holds whole keys.
    Raises:
        ConfigError: it is not YAML, has aliases, or holds texts that are not quoted and look like something else.
    """
    where = f"conf/{group}/{path.name}" if group else f"conf/{path.name}"
    with library_edge(ConfigError, f"{where} is not YAML", "correct it"):
        content = path.read_text(encoding="utf-8")
        if len(content) > LARGEST_BYTES:
            raise ConfigError(f"{where} has more than {LARGEST_BYTES} characters, and is no preset; shorten it")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content, Loader=yaml.SafeLoader)):
            raise ConfigError(f"{where} has aliases (*NAME), which presets may not; write the values out")
        node = yaml.compose(content, Loader=yaml.SafeLoader)
    prefix = group if group and GLOBAL not in content.partition("\n")[0] else ""
    problems = [
        f"{where}: {key}: {value} is read by YAML as something else than this text; quote it: '{value}'"
        for key, value in _misread(prefix, node)
    ]
    if problems:
        raise ConfigError(problems)


def _misread(key: str, node: yaml.Node | None) -> Iterator[tuple[str, str]]:
    """(dotted key, value) of texts that YAML takes for another type."""
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
