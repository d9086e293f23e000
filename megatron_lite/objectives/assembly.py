"""Helpers that objectives share for building a sample."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_lite.objectives.base import Ids

Weights = npt.NDArray[np.float32]


def known(token: int | None) -> int:
    """A required token; data preparation has checked that it exists."""
    assert token is not None
    return token


def filled(length: int, filler: int, *parts: Ids | int) -> tuple[Ids, int]:
    """The concatenated parts (arrays of tokens, or single tokens), padded with `filler` to `length`.

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
    """The decoder's input for predicting `labels` [d]: `first`, then all labels except the last."""
    out = np.empty_like(labels)
    out[0] = first
    out[1:] = labels[:-1]
    return out


def leading(count: int, length: int) -> Weights:
    """Loss weights [length]: 1 at the first `count` positions."""
    weights = np.zeros(length, np.float32)
    weights[:count] = 1
    return weights
