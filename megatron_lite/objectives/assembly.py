"""What objectives share in putting a sample together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_lite.objectives.base import Ids

Weights = npt.NDArray[np.float32]


def known(token: int | None) -> int:
    """A token that the preparation of the data has made sure of."""
    assert token is not None
    return token


def filled(length: int, filler: int, *parts: Ids | int) -> tuple[Ids, int]:
    """The parts (runs of tokens, or single ones) in a row, with `filler` behind them up to `length`.

    Returns:
        tokens [length], and how many of them are not filler
    """
    out = np.full(length, filler, np.int64)
    end = 0
    for part in parts:
        begin, end = end, end + (1 if isinstance(part, int) else len(part))
        out[begin:end] = part
    assert end <= length
    return out, end


def shifted_right(labels: Ids, first: int) -> Ids:
    """What a decoder reads while it predicts `labels` [d]: `first`, then all labels but the last."""
    out = np.empty_like(labels)
    out[0] = first
    out[1:] = labels[:-1]
    return out


def leading(count: int, length: int) -> Weights:
    """Loss weights [length]: 1 at the first `count` positions."""
    weights = np.zeros(length, np.float32)
    weights[:count] = 1
    return weights
