"""The origins file beside a pair of shards, which records where each document came from.

The number of a document in its shard is not enough to find it: documents are split into a training and a validation
set, empty ones are skipped, and one source may consist of many files. So preparation records the file of each document
and its number in that file. Existing Megatron shards have no origins file: they are their own origin.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_lite.data.shards.arrays import ArrayWriter, map_array

ORIGIN_DTYPE = np.dtype([("file", "<u4"), ("number", "<u8")])
"""`file` is an index into `Shard.files`; `number` is the row, line or document in it, from 0, counting empty ones."""


def origins_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".origins")


def origins_writer(prefix: Path) -> ArrayWriter:
    """A writer of 12 bytes per document, in the order of the pair."""
    return ArrayWriter(origins_path(prefix), ORIGIN_DTYPE)


def read_origins(path: Path, size: int) -> npt.NDArray[np.void]:
    """[documents of the pair], ORIGIN_DTYPE.

    Raises:
        DataError: the file is missing, or does not have `size` bytes.
    """
    return map_array(path, ORIGIN_DTYPE, size)
