"""The lines of metrics.jsonl as a stream of typed blocks: only the requested keys are decoded, in bounded memory for
files of any length. Damaged lines are left out and counted, with the steps between which they were.

All readers follow one rule: a line is valid if its step is a number, and only those of its values that are not numbers
are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import msgspec
import numpy as np

from megatron_lite.errors import DamagedFileError
from megatron_lite.observe.envelope import Array
from megatron_lite.observe.phrasing import counted
from megatron_lite.state_files import Object, decode, open_lines, warn

BLOCK_BYTES = 2**18
"""Fits into the CPU cache together with the decoded lines; blocks of 4 MiB take twice the time."""
LONGEST_LINE_BYTES = 2**24
"""A longer line is damage, such as zeros that overwrote many lines."""
MOST_STEPS = 2**53
"""A larger step number is damage."""
MOST_INTEGER = 2**63
MOST_NESTED = 100
COUNTS = ("rollbacks", "samples", "global_batch_size")
"""Figures that are whole numbers, besides the step."""
_BAD = object()

Count = Annotated[int, msgspec.Meta(ge=0, le=MOST_STEPS)]
NonFinite = Literal["NaN", "Infinity", "-Infinity"]
"""Strings for numbers that JSON lacks."""
NON_FINITE = {name: float(name) for name in get_args(NonFinite)}
Figure = float | NonFinite | None
Group = dict[str, Figure] | list[Figure] | None


class Line(msgspec.Struct, gc=False):
    """What every line has; `line_type` adds further keys."""

    step: Count
    rollbacks: Count | None = None


def line_type(numbers: Sequence[str], groups: Sequence[str] = ()) -> type[Line]:
    """A Line type with these keys, each None if a line lacks it.

    Args:
        numbers: single figures.
        groups: nested figures, by layer or by stage.
    """
    kinds: dict[str, Any] = {name: Count | None if name in COUNTS else Figure for name in numbers}
    kinds |= dict.fromkeys(groups, Group)
    fields = [(name, kind, None) for name, kind in kinds.items() if name not in Line.__struct_fields__]
    return cast(type[Line], msgspec.defstruct("FiguresLine", fields, bases=(Line,), gc=False))


@dataclass(frozen=True)
class Gap:
    """A range of steps, `first` to `last`, whose logged lines are missing."""

    first: int
    last: int

    @classmethod
    def read(cls, text: Any) -> Gap | None:
        """Parse the output of `as_text`; None if it is something else."""
        first, _, last = str(text).partition("-")
        return cls(int(first), int(last)) if first.isdecimal() and last.isdecimal() else None

    @property
    def as_text(self) -> str:
        return f"{self.first}-{self.last}"

    def __str__(self) -> str:
        return f"step {self.first:,}" if self.first == self.last else f"steps {self.first:,} to {self.last:,}"


@dataclass
class Block:
    lines: list[Any]
    """Instances of the requested kind; their steps ascend, across blocks as well."""
    steps: Array
    """The steps of the lines."""
    gaps: list[Gap] = field(default_factory=list)
    """Steps of damaged lines between two intact ones."""
    damaged: int = 0
    """Number of lines that are left out, not counting an incomplete last line (after a kill, or during a write)."""
    dropped: int = 0
    """Number of values that are left out."""


def blocks(path: Path, kind: type[Line]) -> Iterator[Block]:
    """All lines of a file in order; none if the file does not exist. Warns of values that are left out."""
    decoder, dropped = _LineDecoder(kind), 0
    for block in _in_order(map(decoder.lines, whole_lines(path))):
        block.dropped = decoder.dropped - dropped
        dropped = decoder.dropped
        yield block
    warn_of_dropped(path, dropped)


def warn_of_dropped(path: Path, count: int) -> None:
    if count:
        warn(dropped_text(count, str(path)))


def dropped_text(count: int, file: str) -> str:
    what = "is not a number and is" if count == 1 else "are not numbers and are"
    return f"{counted(count, 'value')} of {file} {what} left out"


class RawLine(msgspec.Struct, gc=False):
    step: int
    text: bytes
    """With its newline."""


def raw_blocks(path: Path, *, is_suspect: bool) -> Iterator[Block]:
    """The same lines with their texts: RawLines.

    Args:
        is_suspect: the file is known to be changed, so every byte of a line is checked, not only the requested keys.
    """
    decoder = _LineDecoder(Line)
    return _in_order(_raw_lines(piece, decoder, is_suspect) for piece in whole_lines(path))


def lines_beyond(piece: bytes, step: int) -> bytes:
    """The lines of later steps; finding them costs a fraction of decoding them completely.

    Args:
        piece: from `whole_lines`.
    """
    return b"".join(line.text for line in _raw_lines(piece, _LineDecoder(Line)) if line and line.step > step)


def _raw_lines(piece: bytes, decoder: _LineDecoder, is_suspect: bool = False) -> list[Any]:
    texts = piece[:-1].split(b"\n")
    found = [] if is_suspect and not _is_sound_text(piece) else decoder.lines(piece)
    if len(found) != len(texts):  # the decoder ignores blank lines
        found = [decoder.lenient(text) for text in texts]
    return [None if line is None else RawLine(line.step, text + b"\n") for line, text in zip(found, texts, strict=True)]


def _is_sound_text(piece: bytes) -> bool:
    """Whether every line is JSON to its last byte."""
    try:
        _OBJECTS.decode_lines(piece)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False
    return True


_OBJECTS = msgspec.json.Decoder(Object)


def _in_order(pieces: Iterable[list[Any]]) -> Iterator[Block]:
    """Blocks without damaged lines (None) and lines that are out of order."""
    last, broken = 0, False
    held: list[Any] = []
    for piece in pieces:
        found = [*held, *piece]
        held = [found.pop()] if found else []  # only the next line shows whether a line is in order
        block, last, broken = _ascending(found, held[0] if held else None, last, broken)
        yield block
    yield _ascending(held, None, last, broken)[0]


def whole_lines(path: Path, begin: int = 0) -> Iterator[bytes]:
    """The text of a file in pieces that end with a newline; a line that is too long becomes one damaged line.

    Args:
        begin: byte offset of the beginning of a line.
    """
    file = open_lines(path)
    if file is None:
        return
    with file:
        file.seek(begin)
        while piece := file.read(BLOCK_BYTES):
            end = file.readline(LONGEST_LINE_BYTES)
            if end[-1:] == b"\n" or piece[-1:] == b"\n":
                yield piece + end
                continue
            whole, _, torn = piece.rpartition(b"\n")
            yield whole + b"\n" if whole else b""
            if len(end) == LONGEST_LINE_BYTES:
                while (end := file.readline(LONGEST_LINE_BYTES)) and end[-1:] != b"\n":
                    pass
            elif (torn + end)[:1] in (b"{", b""):
                continue  # an incomplete last line: after a kill, or still being written
            yield b"\0\n"


def _ascending(found: list[Any], following: Any, last: int, broken: bool) -> tuple[Block, int, bool]:
    """The lines in ascending order of steps after step `last`; `broken`: a damaged line was just before."""
    if not broken and (block := _all_in_place(found, following, last)) is not None:
        return block, int(block.steps[-1]) if found else last, False
    lines, gaps, damaged = list[Any](), list[Gap](), 0
    after = [0 if line is None else line.step for line in (*found[1:], following)]
    for line, next_step in zip(found, after, strict=False):  # there may be no line at all
        if line is None or line.step <= last or last < next_step <= line.step:
            damaged += 1
            broken = True
            continue
        if broken and line.step > last + 1:
            gaps.append(Gap(last + 1, line.step - 1))
        lines.append(line)
        last, broken = line.step, False
    return Block(lines, _steps(lines), gaps, damaged), last, broken


def _all_in_place(found: list[Any], following: Any, last: int) -> Block | None:
    """Fast path for blocks without damage, which nearly all are; None if anything is damaged."""
    try:
        steps = _steps(found)
    except AttributeError:  # a damaged line is None
        return None
    after = [] if following is None else [following.step]
    in_place = (np.diff(np.concatenate([[last], steps, after])) > 0).all()
    return Block(found, steps) if in_place else None


def _steps(lines: list[Any]) -> Array:
    return np.fromiter(map(attrgetter("step"), lines), np.int64, len(lines))


class _LineDecoder:
    """Decodes text into instances of a type of line."""

    def __init__(self, kind: type[Line]) -> None:
        self._kind = kind
        self._decoder = msgspec.json.Decoder(kind)
        self._groups = {field.name for field in msgspec.structs.fields(kind) if field.type == Group}
        self.dropped = 0
        """Number of values left out so far."""

    def lines(self, text: bytes) -> list[Any]:
        """An instance for each line; None for a damaged one."""
        try:
            return self._decoder.decode_lines(text)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return [self._one(line) for line in text[:-1].split(b"\n")]

    def lenient(self, line: bytes) -> Any:
        """Decode a line without the values that are not numbers, e.g. a line of another version."""
        entry = sound_object(line)
        if entry is None:
            return None
        figures = {"step": entry["step"]}
        for name in self._kind.__struct_fields__:
            if name in entry and name != "step":
                value, dropped = _sound(name, entry[name], int(name in self._groups))
                self.dropped += dropped
                figures |= {} if value is _BAD else {name: value}
        return self._kind(**figures)

    def _one(self, line: bytes) -> Any:
        try:
            return self._decoder.decode(line)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return self.lenient(line)


def sound_object(line: bytes) -> dict[str, Any] | None:
    """A line with a valid step, decoded; None for a damaged one."""
    for text in (line, line.decode("utf-8", errors="replace")):  # a key may contain invalid UTF-8
        with suppress(DamagedFileError):
            entry = decode(text, Object, "")
            return entry if _is_count(entry.get("step")) else None
    return None


def sound_figures(entry: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The numeric values of a decoded line, nested ones too, and how many values are left out.

    NaN and infinities stay strings, as in JSON. In a list a left-out value becomes None, so the others keep their
    places.
    """
    found: dict[str, Any] = {}
    dropped = 0
    for name, value in entry.items():
        found[name], bad = _sound(name, value, MOST_NESTED)
        dropped += bad
    return {name: value for name, value in found.items() if value is not _BAD}, dropped


def _sound(name: str, value: Any, depth: int) -> tuple[Any, int]:
    """A value as in sound_figures, or _BAD; `depth`: how deeply it may be nested."""
    if name in COUNTS:
        return (value, 0) if value is None or _is_count(value) else (_BAD, 1)
    if isinstance(value, dict | list) and depth > 0:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        inner = {key: _sound("", one, depth - 1) for key, one in items}
        dropped = sum(bad for _, bad in inner.values())
        if isinstance(value, list):
            return [None if one is _BAD else one for one, _ in inner.values()], dropped
        return {key: one for key, (one, _) in inner.items() if one is not _BAD}, dropped
    return (_figure(value), 0) if _is_figure(value) else (_BAD, 1)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST_STEPS


def _is_figure(value: Any) -> bool:
    return value is None or isinstance(value, int | float) or (isinstance(value, str) and value in NON_FINITE)


def _figure(value: Any) -> Any:
    """The value itself, but integers of more than 64 bits become floats, as in a typed line."""
    if not isinstance(value, int) or abs(value) < MOST_INTEGER:
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
