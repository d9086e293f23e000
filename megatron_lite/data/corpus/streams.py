"""Read the bytes of a file, decompress them and split them into records of limited size, in bounded memory.

Records are split before they are decoded, so a byte that is not UTF-8 spoils only its own record.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from megatron_lite.data.corpus.sources import Source
from megatron_lite.errors import DataError, library_edge

CHUNK_BYTES = 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
OTHER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",  # must come before UTF-16, whose mark is a prefix of it
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}

Progress = Callable[[int], None]
"""Called about every MiB with the number of bytes read since the last call."""


def ignore_progress(count: int) -> None: ...


def require_no_other_mark(begin: bytes, path: Path, owner: str) -> None:
    """
    Args:
        begin: the first unpacked bytes of a text file.
        owner: the setting that names the file.
    Raises:
        DataError: the file begins with the byte order mark of UTF-16 or UTF-32.
    """
    name = next((name for mark, name in OTHER_MARKS.items() if begin.startswith(mark)), None)
    if name is not None:
        old = shlex.quote(str(path))
        way = f"`iconv -f {name} -t UTF-8 < {old} > OUT{path.suffix}`"
        if path.suffix.lower() in _PACKED:
            way = f"`iconv -f {name} -t UTF-8` after unpacking"
        raise DataError(
            f"{path} (of {owner}) is {name}, by its byte order mark; convert it, as with {way}, and name the result"
        )


class Oversized(NamedTuple):
    """Takes the place of a record that is longer than allowed."""

    size_bytes: int


def reading(path: Path | str, source: Source, where: str = "") -> AbstractContextManager[None]:
    """Wraps every library call that reads a file of a source: any exception becomes a DataError.

    Args:
        where: the place in the file, for the message.
    """
    what = f"{path} (of {source}) cannot be read{f' {where}' if where else ''}"
    return library_edge(DataError, what, "copy it again, or name another file")


def read_chunks(path: Path, source: Source, progress: Progress = ignore_progress) -> Iterator[bytes]:
    """The unpacked bytes of a file, without a byte order mark.

    Raises:
        DataError: it cannot be opened, its compressed stream is damaged or cut off, or it is UTF-16.
    """
    position = 0
    with reading(path, source):
        file = _open(path)
    with file:
        while True:
            with reading(path, source, f"beyond {position:,} unpacked bytes"):
                chunk = file.read(CHUNK_BYTES)
            if not chunk:
                return
            if not position:
                require_no_other_mark(chunk, path, str(source))
            progress(len(chunk))
            yield chunk if position else chunk.removeprefix(BYTE_ORDER_MARK)
            position += len(chunk)


def read_records(
    path: Path,
    source: Source,
    *,
    separator: str | None,
    limit_bytes: int,
    universal_newlines: bool = False,
    progress: Progress = ignore_progress,
) -> Iterator[bytes | Oversized]:
    """The records of a file in order; an empty record after the last separator is dropped.

    Args:
        separator: ends a record; None or empty = the whole file is one record.
        limit_bytes: a longer record is never held in memory.
        universal_newlines: convert Windows line ends to "\\n", so that a separator means the same everywhere.
    Raises:
        DataError: as for `read_chunks`.
    """
    chunks = read_chunks(path, source, progress)
    if universal_newlines:
        chunks = with_newlines(chunks)
        separator = separator and separator.replace("\r\n", "\n").replace("\r", "\n")
    return split_records(chunks, (separator or "").encode("utf-8", "surrogatepass"), limit_bytes)


def split_records(chunks: Iterator[bytes], separator: bytes, limit_bytes: int) -> Iterator[bytes | Oversized]:
    """`b"".join(chunks).split(separator)` without an empty last record, in one pass with one record in memory."""
    overlap = max(len(separator) - 1, 0)
    record = _Record(limit_bytes)
    carry = b""  # the last bytes of a chunk, which may be the start of a separator
    for chunk in chunks:
        joined = carry + chunk
        first, *others = joined.split(separator) if separator else [joined]
        for part in others:
            record.add(first)
            yield record.take()
            first = part
        cut = len(first) - overlap if len(first) > overlap else 0
        record.add(first[:cut])
        carry = first[cut:]
    record.add(carry)
    if record.size_bytes:
        yield record.take()


class _Record:
    """Collects the pieces of the current record; drops them once it is too long."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._pieces: list[bytes] = []
        self.size_bytes = 0

    def add(self, piece: bytes) -> None:
        self.size_bytes += len(piece)
        if self.size_bytes > self._limit:
            self._pieces.clear()
        else:
            self._pieces.append(piece)

    def take(self) -> bytes | Oversized:
        taken = Oversized(self.size_bytes) if self.size_bytes > self._limit else b"".join(self._pieces)
        self._pieces, self.size_bytes = [], 0
        return taken


def with_newlines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes, with "\\r\\n" and "\\r" replaced by "\\n"."""
    held = b""  # a "\r" whose "\n" may be in the next chunk
    for chunk in chunks:
        joined = held + chunk
        held = joined[-1:] if joined.endswith(b"\r") else b""
        yield joined.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if held:
        yield b"\n"


def _open(path: Path) -> IO[bytes]:
    opener = _PACKED.get(path.suffix.lower(), io.FileIO)
    return cast(IO[bytes], opener(path))


def _zstandard(path: Path) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


_PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstandard,
}
"""Decompressors by suffix. None of them decompresses more than it is asked for."""
