"""The lines of metrics.jsonl as a stream of typed blocks: only the wanted keys are decoded, and memory stays bounded
however long the file is. What is damaged is left out, and counted, with the steps between which it stood."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import msgspec

from megatron_lite.errors import DamagedFileError
from megatron_lite.state_files import Object, decode, open_lines

BLOCK_BYTES = 2**22
LONGEST_LINE_BYTES = 2**24
"""A line that is longer is damage, such as zeros over what were many lines."""


MOST_STEPS = 2**53
"""A larger number of a step is damage."""
Count = Annotated[int, msgspec.Meta(ge=0, le=MOST_STEPS)]


class Line(msgspec.Struct, gc=False):
    """What every line has; `line_type` adds further keys."""

    step: Count
    rollbacks: Count | None = None


def line_type(numbers: Sequence[str], groups: Sequence[str] = ()) -> type[Line]:
    """A Line with these keys, each None where a line lacks it.

    Args:
        numbers: figures. NaN and infinities are strings, as JSON has no word for them.
        groups: nested figures, by layer or by stage.
    """
    fields: list[tuple[str, Any, Any]] = [(name, float | str | None, None) for name in numbers if name != "rollbacks"]
    fields += [(name, dict[str, Any] | list[Any] | None, None) for name in groups]
    return cast(type[Line], msgspec.defstruct("FiguresLine", fields, bases=(Line,), gc=False))


@dataclass(frozen=True)
class Gap:
    """Steps whose lines are missing: from `first` to `last`, as far as they were to be logged."""

    first: int
    last: int

    @classmethod
    def read(cls, text: Any) -> Gap | None:
        """Of `as_text`; None where it is something else."""
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
    """Instances of the kind that was asked for; their steps ascend, from block to block as well."""
    gaps: list[Gap] = field(default_factory=list)
    """What is damaged between two lines that are not."""
    damaged: int = 0
    """Lines that are left out; a last line that a kill or a writer at work leaves without a newline is none of them."""


def blocks(path: Path, kind: type[Line]) -> Iterator[Block]:
    """All lines of a file in order; nothing where there is no file."""
    decoder = msgspec.json.Decoder(kind)
    return _in_order(_decoded(text, decoder, kind) for text in whole_lines(path))


class RawLine(msgspec.Struct, gc=False):
    step: int
    text: bytes
    """With its newline."""


def raw_blocks(path: Path, *, is_suspect: bool) -> Iterator[Block]:
    """The same with the text of each line: RawLines.

    Args:
        is_suspect: the file is known to be changed, so every byte of a line is checked, not only the wanted keys.
    """
    decoder = msgspec.json.Decoder(Line)
    return _in_order(_raw_lines(piece, None if is_suspect else decoder) for piece in whole_lines(path))


def _raw_lines(piece: bytes, decoder: msgspec.json.Decoder[Any] | None) -> list[Any]:
    texts = piece[:-1].split(b"\n")
    found = _decoded(piece, decoder, Line) if decoder is not None else []
    if len(found) != len(texts):  # blank lines are none to the decoder
        return [_raw(text) for text in texts]
    return [None if line is None else RawLine(line.step, text + b"\n") for line, text in zip(found, texts, strict=True)]


def _raw(text: bytes) -> RawLine | None:
    line = _lenient(text, Line)
    return None if line is None else RawLine(line.step, text + b"\n")


def _in_order(pieces: Iterable[list[Any]]) -> Iterator[Block]:
    """Without what is damaged, which is None, or stands out of its place."""
    last, broken = 0, False
    held: list[Any] = []
    for piece in pieces:
        found = [*held, *piece]
        held = [found.pop()] if found else []  # whether a line is in its place only the one behind it tells
        block, last, broken = _ascending(found, held[0] if held else None, last, broken)
        yield block
    yield _ascending(held, None, last, broken)[0]


def whole_lines(path: Path, begin: int = 0) -> Iterator[bytes]:
    """The text of a file in pieces that end with a newline; what is too long for a line is one damaged one.

    Args:
        begin: byte of the file at which a line begins.
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
                continue  # a kill, or a writer at work, has left it
            yield b"\0\n"


def _decoded(text: bytes, decoder: msgspec.json.Decoder[Any], kind: type[Line]) -> list[Any]:
    """An instance for each line; None for a damaged one."""
    try:
        return decoder.decode_lines(text)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return [_one(line, decoder, kind) for line in text[:-1].split(b"\n")]


def _one(line: bytes, decoder: msgspec.json.Decoder[Any], kind: type[Line]) -> Any:
    try:
        return decoder.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _lenient(line, kind)


def _lenient(line: bytes, kind: type[Line]) -> Any:
    """A line of another version may have another type of value under a name; the step is all that it must have."""
    try:
        entry = decode(line, Object, "")
    except DamagedFileError:
        return None
    counts = {name: value for name in ("step", "rollbacks") if _is_count(value := entry.get(name))}
    if "step" not in counts:
        return None
    figures = {name: value for name, value in entry.items() if name in kind.__struct_fields__ and _is_figure(value)}
    return kind(**figures | {"rollbacks": None} | counts)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_STEPS


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float | str) and not isinstance(value, bool)


def _ascending(found: list[Any], following: Any, last: int, broken: bool) -> tuple[Block, int, bool]:
    """The lines whose steps ascend, behind a line of step `last`; `broken`: something damaged stood there."""
    steps = [line.step if line is not None else 0 for line in found]
    after = [*steps, 0 if following is None else following.step]
    ascends = all(map(int.__lt__, [last, *steps], steps))
    if not broken and ascends and (not steps or following is None or steps[-1] < after[-1]):
        return Block(found), steps[-1] if steps else last, False
    block = Block([])
    for place, line in enumerate(found):
        if line is None or line.step <= last or last < after[place + 1] <= line.step:
            block.damaged += 1
            broken = True
            continue
        if broken and line.step > last + 1:
            block.gaps.append(Gap(last + 1, line.step - 1))
        block.lines.append(line)
        last, broken = line.step, False
    return block, last, broken
