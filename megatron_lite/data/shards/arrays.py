"""Flat files of numbers beside a pair of shards: written one stretch after another, mapped into memory when read."""

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
    again = "remove its folder to prepare it again"
    try:
        found = path.stat().st_size
        if found == size > 0:
            return map_file(path, dtype)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {remedy_of(error, again)}") from None
    raise DataError(f"{path} is {found:,} bytes; {size:,} were written; {again}")


def map_file(path: Path, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """All of a file, read-only and paged in on use. No descriptor stays open, so any number of files may be mapped.

    Python's own maps keep a descriptor each (until `trackfd` of 3.13), and a blend of sources maps several files of
    each for the whole run.

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
    unmap = weakref.finalize(memory, _libc().munmap, address, size)  # with the last array that looks at it
    unmap.atexit = False  # at the end of the process other threads may still read
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
