"""The rules of single values: each number within its range, each text of its form, as the fields declare them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_lite.config.facts import ranges_of_numbers, rules_of_texts
from megatron_lite.config.keys import get_value, shown
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import ConfigError


def out_of_range(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, message) of each number that is out of range by itself; in a list, of each of its numbers."""
    for key, allowed in ranges_of_numbers().items():
        value = get_value(config, key)
        values = {f"{key}[{i}]": number for i, number in enumerate(value)} if isinstance(value, list) else {key: value}
        for name, number in values.items():
            problem = None if number is None else allowed.problem(number)
            if problem is not None:
                shown_value = shown(str(number)) if isinstance(number, int) else format(number, "g")
                yield key, f"{name}={shown_value} {problem}"


def out_of_form(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, message) of each invalid text; in a list or a map, of each invalid entry."""
    for key, check in rules_of_texts().items():
        for name, text in _entries(key, get_value(config, key)):
            if not isinstance(text, str):
                yield key, f"{name}={shown(str(text))} is not a text; quote it: {name}='{shown(str(text))}'"
            elif problem := check(text):
                yield key, f"{name}={shown(text) or repr(text)} {problem}"


def require_form(config: RunConfig, key: str) -> None:
    """Check a single text, for files that are read before the whole configuration can be checked.

    Raises:
        ConfigError: with the messages of `out_of_form`.
    """
    problems = [message for found, message in out_of_form(config) if found == key]
    if problems:
        raise ConfigError(problems)


def _entries(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        yield from ((f"{key}[{i}]", entry) for i, entry in enumerate(value))
    elif isinstance(value, dict):
        yield from ((f"{key}.{name}", entry) for name, entry in value.items())
    elif value is not None:
        yield key, value
