"""Megatron's `.bin/.idx` shards: a vectorised writer and a memory-mapped reader.

Layout of the .idx file, little-endian and without padding (megatron/core/datasets/indexed_dataset.py):
    magic b"MMIDIDX\\0\\0", version u64 = 1, dtype code u8, number of sequences u64, number of document bounds u64,
    length of each sequence in tokens i32[], byte offset of each sequence in the .bin i64[],
    document bounds i64[]: document k holds the sequences [bounds[k], bounds[k + 1]).
The .bin file contains only the tokens.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_lite.data.shards.arrays import map_file
from megatron_lite.errors import DataError, remedy_of

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
OTHERS = "copy the pair again from the original, or create the shards again"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
CODE_OF_DTYPE = {np.dtype(dtype): code for code, dtype in DTYPE_OF_CODE.items()}
LARGEST_UINT16_VOCAB = 65_500  # Megatron's bound: ids of smaller vocabularies are stored in two bytes


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype that Megatron chooses for ids below `vocab_size`."""
    return np.dtype(np.uint16 if vocab_size < LARGEST_UINT16_VOCAB else np.int32)


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


@dataclass(frozen=True)
class ShardFacts:
    """Sizes and checksums of a written pair, as recorded in its sidecar."""

    documents: int
    tokens: int
    dtype: str
    bin_bytes: int
    idx_bytes: int
    bin_xxh3: str
    idx_xxh3: str


class IndexedWriter:
    """Writes one pair of files; each document is one sequence.

    Only the lengths are kept in memory (4 bytes per document). Both files are fsynced when `finish` returns.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._lengths: list[npt.NDArray[np.int32]] = []
        self._digest = xxhash.xxh3_128()
        self._bin = bin_path(prefix).open("wb")

    def add(self, tokens: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> None:
        """Append documents: their concatenated tokens [sum(lengths)], and the length of each [documents]."""
        assert int(lengths.sum()) == len(tokens)
        data = np.ascontiguousarray(tokens, dtype=self._dtype).view(np.uint8).data
        self._bin.write(data)
        self._digest.update(data)
        self._lengths.append(np.asarray(lengths, dtype=np.int32))

    def finish(self) -> ShardFacts:
        _sync_and_close(self._bin)
        lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0, np.int32)
        index = pack_index(lengths, self._dtype)
        with idx_path(self._prefix).open("wb") as file:
            file.write(index)
            _sync_and_close(file)
        tokens = int(lengths.sum(dtype=np.int64))
        return ShardFacts(
            documents=len(lengths),
            tokens=tokens,
            dtype=self._dtype.name,
            bin_bytes=tokens * self._dtype.itemsize,
            idx_bytes=len(index),
            bin_xxh3=self._digest.hexdigest(),
            idx_xxh3=xxhash.xxh3_128_hexdigest(index),
        )

    def remove(self) -> None:
        """Delete both files."""
        bin_path(self._prefix).unlink()
        idx_path(self._prefix).unlink()


def pack_index(lengths: npt.NDArray[np.int32], dtype: np.dtype[Any]) -> bytes:
    """The .idx file for documents with one sequence each."""
    pointers = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], out=pointers[1:], dtype=np.int64)
    pointers *= dtype.itemsize
    bounds = np.arange(len(lengths) + 1, dtype="<i8")
    header = HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[dtype], len(lengths), len(bounds))
    return b"".join([header, lengths.astype("<i4").tobytes(), pointers.astype("<i8").tobytes(), bounds.tobytes()])


def _sync_and_close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


class IndexedReader:
    """A validated, memory-mapped pair of files. Also reads Megatron's documents with several sequences.

    Attributes:
        tokens: every token of the file in its stored dtype [total tokens], read-only and memory-mapped.
        document_starts: first token of each document, int64 [documents].
        document_lengths: tokens of each document, int64 [documents].
        sequence_starts: first token of each sequence, int64 [sequences]. If Megatron splits documents into sentences,
            each sentence is a sequence.

    Raises:
        DataError: a file is missing or has the wrong format, or its size does not match the index.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index = _read_bytes(idx_path(prefix))
        self.dtype, sequences, bounds = _parse_header(index, idx_path(prefix))
        lengths, pointers, document_bounds = _parse_arrays(index, sequences, bounds, idx_path(prefix))
        ends = np.cumsum(lengths, dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        _check_size(bin_path(prefix), total * self.dtype.itemsize, idx_path(prefix).name)
        starts = ends - lengths
        self.sequence_starts: npt.NDArray[np.int64] = starts
        if not np.array_equal(pointers, starts * self.dtype.itemsize):
            raise _damaged(idx_path(prefix), "there are gaps between its sequences, or they overlap")
        edges = np.concatenate([starts, [total]])[document_bounds]
        self.document_starts: npt.NDArray[np.int64] = edges[:-1]
        self.document_lengths: npt.NDArray[np.int64] = np.diff(edges)
        self.tokens: npt.NDArray[Any] = _map_tokens(bin_path(prefix), self.dtype)

    @property
    def num_documents(self) -> int:
        return len(self.document_starts)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def document(self, index: int) -> npt.NDArray[Any]:
        """Tokens of one document, a view."""
        start = self.document_starts[index]
        return self.tokens[start : start + self.document_lengths[index]]


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None


def _parse_header(index: bytes, path: Path) -> tuple[np.dtype[Any], int, int]:
    if index[: len(MAGIC)] != MAGIC:
        raise DataError(f"{path} begins with {index[: len(MAGIC)]!r}; a Megatron index begins with {MAGIC!r}; {OTHERS}")
    if len(index) < HEADER.size:
        raise _size_error(path, len(index), HEADER.size, "an index header")
    _, version, code, sequences, bounds = HEADER.unpack_from(index)
    if version != VERSION:
        raise DataError(f"{path} has layout version {version}; only version {VERSION} can be read; {OTHERS}")
    if code not in DTYPE_OF_CODE or not np.issubdtype(DTYPE_OF_CODE[code], np.integer):
        raise _damaged(path, f"its dtype code {code} is not one of Megatron's integer types")
    return np.dtype(DTYPE_OF_CODE[code]), sequences, bounds


def _parse_arrays(index: bytes, sequences: int, bounds: int, path: Path) -> tuple[npt.NDArray[Any], ...]:
    expected = HEADER.size + 12 * sequences + 8 * bounds
    if len(index) not in (expected, expected + sequences):  # multimodal writers append one mode byte per sequence
        raise _size_error(path, len(index), expected, "its header")
    lengths = np.frombuffer(index, "<i4", sequences, HEADER.size)
    pointers = np.frombuffer(index, "<i8", sequences, HEADER.size + 4 * sequences)
    document_bounds = np.frombuffer(index, "<i8", bounds, HEADER.size + 12 * sequences)
    if len(lengths) and int(lengths.min()) < 0:
        raise _damaged(path, "a sequence has a negative length")
    if (
        not bounds
        or document_bounds[0] != 0
        or document_bounds[-1] != sequences
        or np.any(np.diff(document_bounds) < 0)
    ):
        raise _damaged(path, f"its document bounds do not increase from 0 to the {sequences:,} sequences")
    return lengths, pointers, document_bounds


def _check_size(path: Path, expected: int, expected_by: str) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _unreadable(path, error) from None
    if size != expected:
        raise _size_error(path, size, expected, expected_by)


def _map_tokens(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    try:
        return map_file(path, dtype)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    remedy = remedy_of(error, "shards are a pair of .bin and .idx files: copy both again from the original")
    return DataError(f"{path} cannot be read: {error.strerror}; {remedy}")


def _size_error(path: Path, size: int, expected: int, expected_by: str) -> DataError:
    fault = "truncated" if size < expected else "longer than written"
    return DataError(f"{path} is {size:,} bytes; {expected_by} expects {expected:,} ({fault}); {OTHERS}")


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is damaged: {reason}; {OTHERS}")
