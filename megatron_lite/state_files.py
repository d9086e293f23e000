"""Small files that a run leaves for later: read with distrust, whoever wrote them and whatever happened since.

Each such file has a dataclass. What does not decode into it is damaged: torn, zeroed, of another program, or with one
byte flipped. Every reader of JSON in this project goes through here, so a damaged file is one kind of error everywhere,
and who reads decides: stop with its message, or warn and take the safe choice.
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
    """JSON text as an instance of `kind`: a dataclass, or `dict[str, Any]` for what has no fixed fields.

    Types are checked strictly and fields that `kind` lacks are ignored. Numbers have to fit Python's and are finite.

    Args:
        where: the file, and the line where there are several, for the message.
    Raises:
        DamagedFileError: it is not UTF-8, not JSON, nested too deeply, lacks a field, or a value has another type.
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError, TypeError) as error:
        raise DamagedFileError(f"{where} is damaged: {_reason(content, error)}") from error


def fits(value: object, kind: type) -> bool:
    """Whether JSON that is decoded already has the fields and types of a dataclass."""
    try:
        msgspec.convert(value, kind)
    except (msgspec.MsgspecError, ValueError, RecursionError, TypeError, OverflowError):
        return False
    return True


def read_object(path: Path, kind: type[T]) -> T | None:
    """The content of a JSON file as an instance of `kind`; None where there is no such file.

    Raises:
        DamagedFileError: it cannot be read, or `decode` refuses it.
    """
    content = read_bytes(path)
    return None if content is None else decode(content, kind, str(path))


def read_bytes(path: Path) -> bytes | None:
    """The content of a file; None where there is none.

    Raises:
        DamagedFileError: it exists and cannot be read (a folder, a lost disk, no permission).
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
            raise DamagedFileError(f"{path} cannot be read: it is not a regular file")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read: {error.strerror or error}") from error


def open_lines(path: Path) -> BinaryIO | None:
    """Open a file of lines for reading, however long it is; None where there is none.

    What cannot be read counts as missing, with a warning: a folder, or a pipe, whose opening would wait for ever.
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
    """The same as text for people: bytes that are not UTF-8 are shown as U+FFFD."""
    content = read_bytes(path)
    return None if content is None else content.decode("utf-8", errors="replace")


@dataclass(frozen=True)
class DamagedLine:
    """A line of a JSONL file that is not what was written there."""

    number: int
    """1 = the first line of the file."""
    reason: str


def warn(problem: object) -> None:
    """Tell people of a damaged file that nothing has to stop for."""
    print(f"warning: {problem}", file=sys.stderr, flush=True)


def sound_lines(path: Path, kind: type[T]) -> list[T]:
    """All lines of a JSONL file that are what was written, with a warning of the others; a missing file has none."""
    try:
        content = read_bytes(path)
    except DamagedFileError as error:
        warn(f"{error}; it counts as empty")
        return []
    sound = []
    for line in lines_of(content or b"", kind, str(path)):
        if isinstance(line, DamagedLine):
            warn(f"{line.reason}; it is passed over")
        else:
            sound.append(line)
    return sound


def lines_of(content: bytes, kind: type[T], where: str) -> Iterator[T | DamagedLine]:
    """The lines of a JSONL file in order, each decoded or named as damaged; what has no newline behind it is damaged.

    Splits at newlines alone: JSON text may hold other characters that `splitlines` would split at.
    """
    *complete, torn = content.split(b"\n")
    for number, line in enumerate(complete, start=1):
        try:
            yield decode(line, kind, f"{where}, line {number}")
        except DamagedFileError as error:
            yield DamagedLine(number, str(error))
    if torn:
        yield DamagedLine(len(complete) + 1, f"{where}, line {len(complete) + 1} is damaged: it was cut short")


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
