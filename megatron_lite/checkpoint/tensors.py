"""Compare tensors of safetensors files block by block. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.config.hf.headers import TensorEntry
from megatron_lite.errors import CheckpointError

BLOCK_ELEMENTS = 2**20
# safetensors' names -> numpy dtypes; numpy has no bf16, so it is read as the upper half of an fp32.
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


def difference(first: TensorEntry, second: TensorEntry) -> str | None:
    """How two tensors differ, as text; None if they are bitwise equal.

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
        largest = float(np.maximum(largest, found))  # np.maximum keeps a NaN, max() does not
    return None if same else f"max abs {largest:.3g}{dtypes}"


def is_zero(tensor: TensorEntry) -> bool:
    """Whether every element is 0 (or -0).

    Raises:
        CheckpointError: a file is shorter than its header says.
    """
    if tensor.dtype not in DTYPES:
        return not any(block.strip(b"\0") for block in _bytes(tensor))
    return not any(_numbers(block, tensor.dtype).any() for block in _blocks(tensor))


def _shape(tensor: TensorEntry) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def _bytes(tensor: TensorEntry, block_bytes: int = BLOCK_ELEMENTS) -> Iterator[bytes]:
    with tensor.file.open("rb") as file:
        start, stop = tensor.offsets
        file.seek(start)
        left = stop - start
        while left:
            block = file.read(min(block_bytes, left))
            if not block:
                raise CheckpointError(f"{tensor.file} is shorter than its header says; restore an undamaged copy")
            left -= len(block)
            yield block


def _blocks(tensor: TensorEntry) -> Iterator[npt.NDArray[Any]]:
    """The elements in blocks; a block has the same number of elements for any dtype."""
    dtype = np.dtype(DTYPES[tensor.dtype])
    return (np.frombuffer(block, dtype) for block in _bytes(tensor, BLOCK_ELEMENTS * dtype.itemsize))


def _numbers(block: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float64]:
    if dtype == "BF16":
        block = (block.astype(np.uint32) << 16).view(np.float32)
    return block.astype(np.float64)


def _largest(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """The largest absolute difference; NaN if an element is NaN in only one of the arrays."""
    unequal = (one != other) & ~(np.isnan(one) & np.isnan(other))
    return float(np.abs(one[unequal] - other[unequal]).max(initial=0.0))
