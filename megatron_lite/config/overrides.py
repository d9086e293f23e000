"""The meaning of `key=value` on a command line: texts are taken literally, other values are parsed by Hydra.

Hydra gives every value the type that it looks like, so a text such as `1.10` would become `1.1` and `12e5` 1200000.0.
Here the schema decides. A text is taken literally, with five exceptions:

- `null` is None if the setting may be None (`'key="null"'` is the text);
- a quoted text, by Hydra's rules, is what the quotes enclose;
- a comma separates the values of a sweep, and brackets and braces enclose a list or a map: such a text must be quoted;
- `${other.key}` is the value of another setting (`\\${...}` is the text);
- in `ESCAPED` settings `\\n`, `\\t`, `\\\\` and `\\uXXXX` have their meaning in Python.
"""

from __future__ import annotations

import re
import shlex
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_lite.config.keys import (
    Shape,
    expects,
    is_group,
    may_be_null,
    nearest_key,
    schema_keys,
    shown,
    text_shape,
    unknown_key,
)
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import ConfigError, library_edge

ESCAPED = frozenset({"data.document_separator"})
ESCAPE = re.compile(r"\\(?:([nrtfv0\\])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.?))", re.DOTALL)
SIMPLE_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0", "\\": "\\"}
INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
MISSING = "???"  # OmegaConf's mark of a missing value
QUOTES = "'\""
SWEEP_FUNCTION = re.compile(r"\s*(?:choice|range|interval|glob|shuffle|sort|tag)\s*\(")  # Hydra's
CHOICE = re.compile(r"\s*choice\s*\((.*)\)\s*", re.DOTALL)
OPENING, CLOSING = "([{", ")]}"
BEFORE_A_PART = ("", ",", ":", *OPENING)


class _UnclearError(ValueError):
    """An ambiguous text; the message follows the override."""


def key_of(word: str) -> str:
    """The key of `key=value`, without the prefix that marks an addition."""
    return word.lstrip("+").partition("=")[0]


def is_text(word: str) -> bool:
    """Whether the override sets a text setting."""
    return text_shape(key_of(word)) is not None


def check_form(word: str) -> None:
    """Refuse arguments that do not have the form `key=value`.

    Raises:
        ConfigError: it is an option, removes a key, or has no value.
    """
    if word.startswith("-"):
        raise ConfigError(f"{shown(word)} is not an option; settings are written key=value, without dashes")
    if word.startswith("~"):
        raise ConfigError(f"{shown(word)} would remove a setting, which is not possible; set it to a value or to null")
    if "=" not in word:
        suggestion = nearest_key(word) or "train.steps"
        raise ConfigError(f"{shown(word)!r} has no value; settings are written key=value, such as {suggestion}=VALUE")


def parse(word: str) -> Override:
    """Parse the override with Hydra.

    Raises:
        ConfigError: Hydra cannot parse it.
    """
    check_form(word)
    parts = split(word.partition("=")[2])
    if len(parts) > 1 and not all(part.strip() for part in parts):
        raise ConfigError(f"{shown(word)} has a comma without a value beside it; leave the comma out")
    with library_edge(ConfigError, f"{shown(word)} cannot be read", f"write {_how_to_write(key_of(word))}"):
        return OverridesParser.create().parse_override(word)


def read(word: str) -> list[tuple[str, Any]]:
    """The settings of an override, each with its value for OmegaConf: several for `group={key:value}`.

    Raises:
        ConfigError: the setting cannot have this value. The key has already been checked.
    """
    key, value = key_of(word), word.partition("=")[2]
    shape = text_shape(key)
    if shape is None:
        return _read_typed(key, parse(word), word)
    try:
        return [(key, _read_text(key, value, shape))]
    except _UnclearError as unclear:
        raise ConfigError(f"{shown(word)} {unclear}") from None


def _read_text(key: str, value: str, shape: Shape) -> Any:
    bare = value.strip()
    if bare == "null" and may_be_null(key):
        return None
    if bare == "null" and shape is not Shape.map:
        raise _UnclearError(
            f"is not possible: {key} must be {expects(key)}; for the text null write {as_typed(key, value)}"
        )
    if shape in (Shape.texts, Shape.text_or_texts) and bare.startswith("["):
        return [_element(key, part) for part in _inside(key, bare, "[]")]
    if shape is Shape.map:
        if not bare.startswith("{"):
            raise _UnclearError(f"is not possible: {key} must be {expects(key)}")
        return dict(_entry(key, part) for part in _inside(key, bare, "{}"))
    if shape is Shape.texts:
        raise _UnclearError(f"is not possible: {key} must be {expects(key)}; write {as_typed(key, value)}")
    return _literal(key, value)


def _element(key: str, part: str) -> str:
    bare = part.strip()
    if bare == "null" or bare[:1] in ("[", "{"):
        raise _UnclearError(
            f"is not possible: {key} must be {expects(key)}, and {shown(bare)} is none; quote it to mean the text"
        )
    return _literal(key, bare)


def _entry(key: str, part: str) -> tuple[str, str]:
    name, colon, value = part.partition(":")
    if not colon or not name.strip():
        raise _UnclearError(f"is not possible: {key} must be {expects(key)}")
    try:
        return name.strip(), _element(key, value)
    except _UnclearError:
        raise _UnclearError(f"is not possible: {key} must be {expects(key)}") from None


def _literal(key: str, value: str) -> str:
    """A text as typed, or what its quotes enclose."""
    bare = value.strip()
    if bare[:1] in tuple(QUOTES):
        text = _unquoted(bare)
        if text is None:
            raise _UnclearError(f"begins with a quote that ends nowhere or too early; write {as_typed(key, value)}")
    elif bare[:1] in ("[", "{"):
        raise _UnclearError(
            f"is not possible: {key} must be {expects(key)}; for the text itself write {as_typed(key, value)}"
        )
    elif len(split(value)) > 1 or SWEEP_FUNCTION.match(value):
        raise _UnclearError(
            f"names several values for one run; start one run for each value, or write {as_typed(key, value)}"
        )
    else:
        text = value
    if text == MISSING:
        raise _UnclearError(f"is not possible: {MISSING} marks a value that is missing; give the value")
    return unescaped(text) if key in ESCAPED else text


def unescaped(text: str) -> str:
    r"""The text with `\n`, `\t`, `\\`, `\u00e9` and the like replaced.

    Raises:
        ValueError: a backslash does not begin any of these.
    """

    def replaced(found: re.Match[str]) -> str:
        simple, *codes, _ = found.groups()
        if simple:
            return SIMPLE_ESCAPES[simple]
        code = next((code for code in codes if code), None)
        if code is None or int(code, 16) > 0x10FFFF or 0xD800 <= int(code, 16) < 0xE000:
            raise _UnclearError(rf"holds {found[0]}, which is not an escape; use \n, \t, \uXXXX, or \\ for a backslash")
        return chr(int(code, 16))

    return ESCAPE.sub(replaced, text)


def _unquoted(text: str) -> str | None:
    """What the quotes around a text enclose, by Hydra's rules; None if they do not enclose all of it."""
    try:
        with library_edge(ConfigError, text):
            override = OverridesParser.create().parse_override(f"key={text}")
            value = None if override.is_sweep_override() else override._value
    except ConfigError:
        return None
    return value.text if isinstance(value, QuotedString) else None


def quoted(text: str) -> str:
    """The text in quotes, so that `read` returns it unchanged."""
    escaped = re.sub(r'(\\*)(?="|\Z)', lambda run: 2 * run[1], text)
    return '"' + escaped.replace('"', r"\"") + '"'


def as_typed(key: str, value: str) -> str:
    """The override, quoted for a shell, that gives the setting this text; for a list, its only entry."""
    literal = quoted(value)
    return shlex.quote(f"{key}=[{literal}]" if text_shape(key) is Shape.texts else f"{key}={literal}")


def split(text: str) -> list[str]:
    """Split at commas outside of quotes and brackets; quotes count only at the start of a part."""
    parts, start, depth, i = [], 0, 0, 0
    while i < len(text):
        letter = text[i]
        if letter in QUOTES and text[:i].rstrip()[-1:] in BEFORE_A_PART:
            i = _end_of_quoted(text, i)
        elif letter in OPENING:
            depth += 1
        elif letter in CLOSING:
            depth -= 1
        elif letter == "," and depth <= 0:
            parts.append(text[start:i])
            start = i + 1
        i += 1
    return [*parts, text[start:]]


def _end_of_quoted(text: str, start: int) -> int:
    """Index of the closing quote, or the end of the text without one. Backslashes before a quote are paired."""
    for found in re.finditer(rf"(\\*){text[start]}", text[start + 1 :]):
        if len(found[1]) % 2 == 0:
            return start + found.end()
    return len(text)


def _inside(key: str, text: str, brackets: str) -> list[str]:
    """The parts of a list or a map."""
    inner = text[1:-1]
    if len(text) < 2 or not text.endswith(brackets[1]):
        raise _UnclearError(f"opens a {brackets[0]} and does not close it; {key} must be {expects(key)}")
    return split(inner) if inner.strip() else []


def sweep_values(value: str) -> list[str] | None:
    """The values of a sweep over a text, `a,b` or `choice(a,b)`, each as it was typed.

    None for a single value, for blank values, and for functions that Hydra expands, such as `range(1,3)`.
    """
    function = SWEEP_FUNCTION.match(value)
    choice = CHOICE.fullmatch(value)
    if function is not None and choice is None:
        return None
    parts = [part.strip() for part in split(choice[1])] if choice else split(value)
    several = len(parts) > 1 or choice is not None
    return parts if several and all(part.strip() for part in parts) else None


def _read_typed(key: str, override: Override, word: str) -> list[tuple[str, Any]]:
    """A number, an enum member or a bool; an integer may be written 1e3."""
    if override.is_sweep_override():
        raise ConfigError(f"{shown(word)} names several values for one run; start one run for each value")
    with library_edge(ConfigError, f"{shown(word)} cannot be read", f"write {_how_to_write(key)}"):
        value = override.value()
    return _checked(key, value, word)


def _checked(key: str, value: Any, word: str) -> list[tuple[str, Any]]:
    if is_group(key):
        if isinstance(value, dict):
            return [pair for name, part in value.items() for pair in _checked_part(f"{key}.{name}", part)]
        raise ConfigError(
            f"{shown(word)} is not possible: {key} is a group of settings; set single values as {key}.KEY=VALUE"
        )
    if isinstance(value, str) and INTERPOLATION.search(value):
        return [(key, value)]  # its value is known only after composition
    if isinstance(value, float) and value.is_integer() and accepts(key, int(value)) and not accepts(key, value):
        value = int(value)
    nested = isinstance(value, list) and any(isinstance(part, list | dict) for part in value)
    if nested or value == MISSING or not accepts(key, value):
        raise ConfigError(f"{shown(word)} is not possible: {key} must be {expects(key)}")
    return [(key, value)]


def _checked_part(key: str, value: Any) -> list[tuple[str, Any]]:
    if key not in schema_keys():
        raise unknown_key(key)
    return _checked(key, value, f"{key}={'null' if value is None else value}")


def accepts(key: str, value: Any) -> bool:
    """Whether a value has the type of a setting."""
    try:
        OmegaConf.update(_scratch(), key, value, merge=True)
    except (OmegaConfBaseException, ValueError, TypeError):
        return False
    return True


@cache
def _scratch() -> DictConfig:
    """An empty configuration with the types of the schema."""
    return OmegaConf.structured(RunConfig)


def _how_to_write(key: str) -> str:
    """`train.steps as an integer`."""
    if key not in schema_keys():
        return "settings as key=value and presets as group=NAME"
    if is_group(key):
        return f"{key}=NAME with the name of a preset, or single settings as {key}.KEY=VALUE"
    return f"{key}=VALUE with {expects(key)}"
