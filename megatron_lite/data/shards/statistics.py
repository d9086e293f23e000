"""The loss of a unigram model, which knows only token frequencies: a baseline that training must beat."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt


def unigram_cross_entropy_nats(
    train_counts: Sequence[npt.NDArray[np.int64]],
    train_weights: Sequence[float | Fraction],
    validation_counts: Sequence[npt.NDArray[np.int64]],
    validation_weights: Sequence[float | Fraction],
    vocab_size: int,
) -> float:
    """Loss per token, in nats, of the validation tokens under the training tokens' unigram distribution.

    Add-one smoothing: p(token) = (count + 1) / (total + vocab_size). Sources are mixed by their weights, as in the
    training blend. Each source has one array of counts [largest id + 1].
    """
    train = _mixture([(_fit(counts, vocab_size) + 1.0) for counts in train_counts], train_weights)
    validation = _mixture([_fit(counts, vocab_size) for counts in validation_counts], validation_weights)
    return float(-(validation * np.log(train)).sum())


def _fit(counts: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.float64]:
    padded = np.zeros(size)
    padded[: len(counts)] = counts[:size]
    return padded


def _mixture(counts: Sequence[npt.NDArray[np.float64]], weights: Sequence[float | Fraction]) -> npt.NDArray[np.float64]:
    shares = [float(weight) * count / count.sum() for count, weight in zip(counts, weights, strict=True)]
    return np.asarray(np.sum(shares, axis=0))
