"""Where each document of a shard came from: the file beside the pair that says so.

The number of a document in its shard tells little: documents are split into a training and a validation set, empty
ones are left out, and one source may join many files. So preparation writes, for each document of a pair, which file
it was read from and its number there. Ready shards need none: each is its own origin.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_lite.data.shards.arrays import ArrayWriter, map_array

ORIGIN_DTYPE = np.dtype([("file", "<u4"), ("number", "<u8")])
"""`file` counts in `Shard.files`; `number` is that of the row, line or document of it, from 0, empty ones included."""


def origins_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".origins")


def origins_writer(prefix: Path) -> ArrayWriter:
    """12 bytes a document, in the order of the pair."""
    return ArrayWriter(origins_path(prefix), ORIGIN_DTYPE)


def read_origins(path: Path, size: int) -> npt.NDArray[np.void]:
    """[documents of the pair] of ORIGIN_DTYPE.

    Raises:
        DataError: the file is missing, or not of the `size` bytes that were written.
    """
    return map_array(path, ORIGIN_DTYPE, size)
