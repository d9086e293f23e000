"""Strict reading of the small state files that a run writes.

Each such file has a dataclass. Content that does not decode into it is damaged: truncated, zeroed, from another
program, or with a flipped byte. All JSON in this project is read through this module, so a damaged file is the same
error everywhere, and the caller decides: stop with its message, or warn and take the safe choice.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from megatron_lite.errors import DamagedFileError

T = TypeVar("T")


def decode(content: bytes | str, kind: type[T], where: str) -> T:
    """Decode JSON text as an instance of `kind`: a dataclass, or `dict[str, Any]` if there are no fixed fields.

    Types are checked strictly, and fields that `kind` lacks are ignored. Numbers must be finite.

    Args:
        where: the file, and the line number if it has several, for the message.
    Raises:
        DamagedFileError: it is not UTF-8, not JSON, nested too deeply, lacks a field, or a value has another type.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError, TypeError) as error:
        raise DamagedFileError(f"{where} is damaged: {_reason(content, error)}") from error


def fits(value: object, kind: type) -> bool:
    """Whether already decoded JSON has the fields and types of a dataclass."""
    try:
        msgspec.convert(value, kind)
    except (msgspec.MsgspecError, ValueError, RecursionError, TypeError, OverflowError):
        return False
    return True


def read_object(path: Path, kind: type[T]) -> T | None:
    """The content of a JSON file as an instance of `kind`; None if the file does not exist.

    Raises:
        DamagedFileError: it cannot be read or decoded.
    """
    content = read_bytes(path)
    return None if content is None else decode(content, kind, str(path))


def read_bytes(path: Path) -> bytes | None:
    """The content of a file; None if it does not exist.

    Raises:
        DamagedFileError: it exists but cannot be read (a folder, a lost disk, no permission).
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would block forever
            raise DamagedFileError(f"{path} cannot be read: it is not a regular file")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read: {error.strerror or error}") from error


def open_lines(path: Path) -> BinaryIO | None:
    """Open a file of lines, of any length, for reading; None if it does not exist.

    A file that cannot be read (a folder, or a pipe, which would block forever) counts as missing, with a warning.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        warn(f"{path} cannot be read: {error.strerror}; it counts as empty")
        return None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        warn(f"{path} is not a regular file; it counts as empty")
        return None
    return os.fdopen(descriptor, "rb")


def read_text(path: Path) -> str | None:
    """The content as text for people: bytes that are not UTF-8 are shown as U+FFFD; None if it does not exist."""
    content = read_bytes(path)
    return None if content is None else content.decode("utf-8", errors="replace")


@dataclass(frozen=True)
class DamagedLine:
    """A damaged line of a JSONL file."""

    number: int
    """1 = the first line of the file."""
    reason: str


def warn(problem: object) -> None:
    """Print a warning about a damaged file that does not have to stop anything."""
    print(f"warning: {problem}", file=sys.stderr, flush=True)


def sound_lines(path: Path, kind: type[T]) -> list[T]:
    """All intact lines of a JSONL file, with a warning about each damaged one; a missing file has none."""
    try:
        content = read_bytes(path)
    except DamagedFileError as error:
        warn(f"{error}; it counts as empty")
        return []
    sound = []
    for line in lines_of(content or b"", kind, str(path)):
        if isinstance(line, DamagedLine):
            warn(f"{line.reason}; it is skipped")
        else:
            sound.append(line)
    return sound


def lines_of(content: bytes, kind: type[T], where: str) -> Iterator[T | DamagedLine]:
    """The lines of a JSONL file in order, each decoded or as a DamagedLine; a last line without a newline is damaged.

    Splits only at newlines: JSON text may contain other characters at which `splitlines` would split.
    """
    *complete, torn = content.split(b"\n")
    for number, line in enumerate(complete, start=1):
        try:
            yield decode(line, kind, f"{where}, line {number}")
        except DamagedFileError as error:
            yield DamagedLine(number, str(error))
    if torn:
        yield DamagedLine(len(complete) + 1, f"{where}, line {len(complete) + 1} is damaged: it is truncated")


def _reason(content: bytes | str, error: Exception) -> str:
    if not content:
        return "it is empty"
    if isinstance(content, bytes) and not content.strip(b"\0"):
        return "it consists of zero bytes"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return " ".join(str(error).split())


Object = dict[str, Any]
"""A `kind` for files without fixed fields."""
