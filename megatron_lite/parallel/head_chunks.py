"""How the output head and the loss divide a micro-batch; for plans, too, so without torch."""

from __future__ import annotations

import math

_CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}
"""Size of a chunk's logits where `train.head_chunk` leaves it open."""
SOFTMAX_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Logits that are converted to fp32 at once: 1 MB stays in the cache of a CPU core, 256 MB keeps a GPU busy."""
_ROWS_MULTIPLE = 64
"""Chunks have a multiple of this many rows, except the last: matrix products are slower on odd sizes."""


def rows_per_chunk(rows: int, row_bytes: int, device_type: str) -> int:
    """Rows of the chunks into which a micro-batch is divided evenly, so that a chunk's logits fit _CHUNK_BYTES.

    Args:
        row_bytes: of the logits of one token on one rank.
    """
    most = max(_ROWS_MULTIPLE, _CHUNK_BYTES[device_type] // row_bytes)
    if rows <= most:
        return max(rows, 1)
    even = math.ceil(rows / math.ceil(rows / most))
    return min(math.ceil(even / _ROWS_MULTIPLE) * _ROWS_MULTIPLE, rows)
