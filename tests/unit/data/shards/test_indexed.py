"""The .bin/.idx layout, byte by byte, and every way in which a pair of files can be wrong."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megatron_lite.data.shards.indexed import (
    OTHERS,
    IndexedReader,
    IndexedWriter,
    ShardFacts,
    bin_path,
    idx_path,
    token_dtype,
)
from megatron_lite.errors import DataError
from tests.unit.remedies import obeys

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


def write(prefix: Path, documents: list[list[int]] = DOCUMENTS, dtype: type = np.uint16) -> ShardFacts:
    writer = IndexedWriter(prefix, dtype)
    writer.add(np.concatenate([*documents, []]).astype(np.int32), np.array([len(d) for d in documents]))
    return writer.finish()


def packed_index(lengths: list[int], pointers: list[int], bounds: list[int], code: int = 8, version: int = 1) -> bytes:
    """The .idx file, packed by hand."""
    return b"".join(
        [
            b"MMIDIDX\x00\x00",
            struct.pack("<Q", version),
            struct.pack("<B", code),
            struct.pack("<Q", len(lengths)),
            struct.pack("<Q", len(bounds)),
            struct.pack(f"<{len(lengths)}i", *lengths),
            struct.pack(f"<{len(pointers)}q", *pointers),
            struct.pack(f"<{len(bounds)}q", *bounds),
        ]
    )


@pytest.mark.parametrize(("dtype", "code", "letter"), [(np.uint16, 8, "H"), (np.int32, 4, "i")])
def test_files_equal_hand_packed_bytes(tmp_path: Path, dtype: type, code: int, letter: str) -> None:
    write(tmp_path / "x", dtype=dtype)
    width = struct.calcsize(letter)
    index = packed_index([3, 1, 4], [0, 3 * width, 4 * width], [0, 1, 2, 3], code)
    assert (tmp_path / "x.idx").read_bytes() == index
    assert (tmp_path / "x.bin").read_bytes() == struct.pack(f"<8{letter}", *range(5, 13))


def test_facts_are_sizes_and_checksums_of_the_files(tmp_path: Path) -> None:
    facts = write(tmp_path / "x")
    assert (facts.documents, facts.tokens, facts.dtype) == (3, 8, "uint16")
    for path, size, digest in (
        (tmp_path / "x.bin", facts.bin_bytes, facts.bin_xxh3),
        (tmp_path / "x.idx", facts.idx_bytes, facts.idx_xxh3),
    ):
        assert path.stat().st_size == size
        assert xxhash.xxh3_128_hexdigest(path.read_bytes()) == digest


def test_round_trip_over_several_batches(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(0, 60_000, size).tolist() for size in random.integers(0, 50, 200)]
    writer = IndexedWriter(tmp_path / "x", np.uint16)
    for begin in range(0, 200, 33):
        batch = documents[begin : begin + 33]
        writer.add(np.concatenate([*batch, []]).astype(np.int32), np.array([len(d) for d in batch]))
    writer.finish()
    reader = IndexedReader(tmp_path / "x")
    assert [reader.document(i).tolist() for i in range(reader.num_documents)] == documents
    assert reader.num_tokens == sum(map(len, documents))


def test_reads_documents_of_several_sequences(tmp_path: Path) -> None:
    """Megatron splits documents into sentences when asked to; a document is then several sequences."""
    (tmp_path / "x.idx").write_bytes(packed_index([2, 1, 3, 2], [0, 4, 6, 12], [0, 2, 2, 4]))
    (tmp_path / "x.bin").write_bytes(struct.pack("<8H", *range(8)))
    reader = IndexedReader(tmp_path / "x")
    assert [reader.document(i).tolist() for i in range(3)] == [[0, 1, 2], [], [3, 4, 5, 6, 7]]


def test_reads_an_index_with_sequence_modes(tmp_path: Path) -> None:
    (tmp_path / "x.idx").write_bytes(packed_index([2, 1], [0, 4], [0, 1, 2]) + b"\x00\x01")
    (tmp_path / "x.bin").write_bytes(struct.pack("<3H", 1, 2, 3))
    assert IndexedReader(tmp_path / "x").document(1).tolist() == [3]


def test_tokens_are_read_only(tmp_path: Path) -> None:
    write(tmp_path / "x")
    with pytest.raises(ValueError, match="read-only"):
        IndexedReader(tmp_path / "x").tokens[0] = 1


@pytest.mark.parametrize(("vocab_size", "dtype"), [(8192, "uint16"), (65_499, "uint16"), (65_500, "int32")])
def test_dtype_follows_megatrons_bound(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size).name == dtype


@obeys("megatron_lite/data/shards/indexed.py:_size_error")
def test_truncated_bin(tmp_path: Path) -> None:
    write(tmp_path / "x", [list(range(600)) * 2])
    with (tmp_path / "x.bin").open("r+b") as file:
        file.truncate(2396)
    with pytest.raises(DataError) as error:
        IndexedReader(tmp_path / "x")
    assert str(error.value) == f"{tmp_path}/x.bin is 2,396 bytes; x.idx expects 2,400 (truncated); {OTHERS}"
    write(tmp_path / "x", [list(range(600)) * 2])  # made anew
    assert IndexedReader(tmp_path / "x").num_tokens == 1200


def test_bin_that_is_too_long(tmp_path: Path) -> None:
    write(tmp_path / "x")
    with (tmp_path / "x.bin").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=r"x\.bin is 20 bytes; x\.idx expects 16 \(longer than written\)"):
        IndexedReader(tmp_path / "x")


@pytest.mark.parametrize("size", [20, 34, 60])
def test_truncated_idx(tmp_path: Path, size: int) -> None:
    write(tmp_path / "x")
    with (tmp_path / "x.idx").open("r+b") as file:
        file.truncate(size)
    with pytest.raises(DataError, match=rf"x\.idx is {size} bytes; .* expects .* \(truncated\)"):
        IndexedReader(tmp_path / "x")


@pytest.mark.parametrize("path_of", [bin_path, idx_path])
@obeys("megatron_lite/data/shards/indexed.py:_unreadable")
def test_missing_half(tmp_path: Path, path_of: object) -> None:
    write(tmp_path / "x")
    path = path_of(tmp_path / "x")  # type: ignore[operator]
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name} cannot be read: No such file .*a pair of \.bin and \.idx"):
        IndexedReader(tmp_path / "x")
    write(tmp_path / "x")
    assert IndexedReader(tmp_path / "x").num_documents == 3


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"TNTIDX\x00\x00\x00" + bytes(40), r"begins with b'TNTIDX.*; a Megatron index begins with b'MMIDIDX"),
        (packed_index([1], [0], [0, 1], version=2), "has layout version 2; only version 1"),
        (packed_index([1], [0], [0, 1], code=7), "dtype code 7 is not one of"),
        (packed_index([1], [0], [0, 1], code=99), "dtype code 99 is not one of"),
        (packed_index([-1], [0], [0, 1]), "a sequence has a negative length"),
        (packed_index([1], [0], [0, 2]), "document bounds do not increase from 0 to the 1 sequences"),
        (packed_index([1, 1], [0, 2], [0, 2, 1, 2]), "document bounds do not increase"),
        (packed_index([1], [0], []), "document bounds do not increase"),
        (packed_index([2, 1], [0, 2], [0, 1, 2]), "there are gaps between its sequences"),
    ],
)
@obeys("megatron_lite/data/shards/indexed.py:_damaged")
@obeys("megatron_lite/data/shards/indexed.py:_parse_header")
def test_damaged_index(tmp_path: Path, index: bytes, message: str) -> None:
    (tmp_path / "x.idx").write_bytes(index)
    (tmp_path / "x.bin").write_bytes(bytes(6))
    with pytest.raises(DataError, match=rf"x\.idx .*{message}.*; {OTHERS}"):
        IndexedReader(tmp_path / "x")
    write(tmp_path / "x")
    assert IndexedReader(tmp_path / "x").num_documents == 3
