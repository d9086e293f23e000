"""Flat array files beside a pair of shards: appended block by block, memory-mapped when read."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_lite.errors import DataError, remedy_of

MAP_FAILED = ctypes.c_void_p(-1).value


class ArrayWriter:
    """Appends arrays to one file; keeps only the checksum in memory."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.path = path
        self.count = 0
        self._dtype = np.dtype(dtype)
        self._digest = xxhash.xxh3_128()
        self._file = path.open("wb")

    def add(self, values: npt.NDArray[Any]) -> None:
        """Append values [any number], of the file's dtype or one that converts to it."""
        data = np.ascontiguousarray(values, self._dtype).view(np.uint8).data
        self._file.write(data)
        self._digest.update(data)
        self.count += len(values)

    def finish(self, name: str) -> dict[str, Any]:
        """Close the file and return its three `Shard` fields: `name`, `name`_bytes and `name`_xxh3."""
        self._file.close()
        size = self.count * self._dtype.itemsize
        return {name: self.path, f"{name}_bytes": size, f"{name}_xxh3": self._digest.hexdigest()}


def map_array(path: Path, dtype: npt.DTypeLike, size: int) -> npt.NDArray[Any]:
    """Memory-map what `ArrayWriter` wrote.

    Args:
        size: number of bytes that were written.
    Raises:
        DataError: the file is missing, or has another size.
    """
    again = "remove its folder to prepare it again"
    try:
        found = path.stat().st_size
        if found == size > 0:
            return map_file(path, dtype)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {remedy_of(error, again)}") from None
    raise DataError(f"{path} is {found:,} bytes; {size:,} were written; {again}")


def map_file(path: Path, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Memory-map a whole file read-only. No file descriptor stays open, so the number of mapped files is unlimited.

    Python's own mmap keeps one descriptor open per map (before `trackfd` in 3.13), and a blend of sources maps several
    files of each source during the whole run.

    Raises:
        OSError: it cannot be opened or mapped.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:  # an empty file cannot be mapped
            return np.empty(0, dtype)
        address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    memory = (ctypes.c_ubyte * size).from_address(address)
    unmap = weakref.finalize(memory, _libc().munmap, address, size)  # when the last array that views it is freed
    unmap.atexit = False  # other threads may still read while the process exits
    values = np.frombuffer(memoryview(memory).cast("B"), dtype)
    values.flags.writeable = False
    return values


@lru_cache(maxsize=1)
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    )  # fmt: skip
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc
