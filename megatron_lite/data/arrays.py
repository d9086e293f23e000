"""Flat files of numbers beside a pair of shards: written one stretch after another, mapped into memory when read."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_lite.errors import DataError


class ArrayWriter:
    """Appends to one file; holds nothing in memory but the checksum."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.path = path
        self.count = 0
        self._dtype = np.dtype(dtype)
        self._digest = xxhash.xxh3_128()
        self._file = path.open("wb")

    def add(self, values: npt.NDArray[Any]) -> None:
        """The next ones [any number], of the file's dtype or one that it holds."""
        data = np.ascontiguousarray(values, self._dtype).view(np.uint8).data
        self._file.write(data)
        self._digest.update(data)
        self.count += len(values)

    def finish(self, name: str) -> dict[str, Any]:
        """Close the file; the three fields of a `Shard` that tell of it, which begin with `name`."""
        self._file.close()
        size = self.count * self._dtype.itemsize
        return {name: self.path, f"{name}_bytes": size, f"{name}_xxh3": self._digest.hexdigest()}


def map_array(path: Path, dtype: npt.DTypeLike, size: int) -> npt.NDArray[Any]:
    """Memory-map what `ArrayWriter` wrote.

    Args:
        size: bytes that were written.
    Raises:
        DataError: the file is missing, or of another size.
    """
    try:
        found = path.stat().st_size
        if found == size > 0:
            with path.open("rb") as file:
                return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; remove its folder to prepare it again") from None
    raise DataError(f"{path} is {found:,} bytes; {size:,} were written; remove its folder to prepare it again")
