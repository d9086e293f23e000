"""Tensors of safetensors files, found by their headers and compared block by block. Free of torch.

A file begins with the length of its header (8 bytes, little-endian) and the header, JSON of each tensor's dtype, shape
and place behind the header (https://huggingface.co/docs/safetensors, section Format).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.errors import CheckpointError

BLOCK_ELEMENTS = 2**20
LENGTH_BYTES = 8
METADATA = "__metadata__"
# By safetensors' names; bf16, which numpy lacks, is read as the upper halves of fp32.
DTYPES: Mapping[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "u1",
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of one file."""

    name: str
    dtype: str  # safetensors' name: F32, BF16, ...
    shape: tuple[int, ...]
    file: Path
    offset: int  # of its first byte in the file
    bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of a file, in the order of their content.

    Raises:
        CheckpointError: it is no whole safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            size = path.stat().st_size
            if length > size - LENGTH_BYTES:
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = json.loads(file.read(length))
        start = LENGTH_BYTES + length
        found = [_tensor(name, entry, path, start) for name, entry in header.items() if name != METADATA]
        end = max((tensor.offset + tensor.bytes for tensor in found), default=start)
        if end > size:
            raise ValueError(f"tensors up to byte {end:,} in a file of {size:,}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error})") from error
    return sorted(found, key=lambda tensor: tensor.offset)


def difference(first: StoredTensor, second: StoredTensor) -> str | None:
    """How two tensors differ, in words; None where every bit is the same.

    Raises:
        CheckpointError: a file is shorter than its header says.
    """
    if first.shape != second.shape:
        return f"shape {_shape(first)} and {_shape(second)}"
    dtypes = "" if first.dtype == second.dtype else f" ({first.dtype} and {second.dtype})"
    if first.dtype not in DTYPES or second.dtype not in DTYPES:
        same = not dtypes and all(one == other for one, other in zip(_bytes(first), _bytes(second), strict=True))
        return None if same else f"other bytes{dtypes or f' ({first.dtype})'}"
    largest, same = 0.0, not dtypes
    for one, other in zip(_blocks(first), _blocks(second), strict=True):
        if first.dtype == second.dtype and one.tobytes() == other.tobytes():
            continue
        same = False
        found = _largest(_numbers(one, first.dtype), _numbers(other, second.dtype))
        largest = float(np.maximum(largest, found))  # which keeps a NaN, as max() does not
    return None if same else f"max abs {largest:.3g}{dtypes}"


def _tensor(name: str, entry: dict[str, Any], path: Path, start: int) -> StoredTensor:
    first, last = entry["data_offsets"]
    return StoredTensor(name, entry["dtype"], tuple(entry["shape"]), path, start + first, last - first)


def _shape(tensor: StoredTensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def _bytes(tensor: StoredTensor, block_bytes: int = BLOCK_ELEMENTS) -> Iterator[bytes]:
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        left = tensor.bytes
        while left:
            block = file.read(min(block_bytes, left))
            if not block:
                raise CheckpointError(f"{tensor.file} ends within {tensor.name}; see `verify` of its checkpoint")
            left -= len(block)
            yield block


def _blocks(tensor: StoredTensor) -> Iterator[npt.NDArray[Any]]:
    """Consecutive elements, equally many a block for any dtype."""
    dtype = np.dtype(DTYPES[tensor.dtype])
    return (np.frombuffer(block, dtype) for block in _bytes(tensor, BLOCK_ELEMENTS * dtype.itemsize))


def _numbers(block: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float64]:
    if dtype == "BF16":
        block = (block.astype(np.uint32) << 16).view(np.float32)
    return block.astype(np.float64)


def _largest(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """The largest distance of two numbers; NaN where one of them is NaN alone."""
    unequal = (one != other) & ~(np.isnan(one) & np.isnan(other))
    return float(np.abs(one[unequal] - other[unequal]).max(initial=0.0))
