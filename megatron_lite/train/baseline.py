"""How well a model would do that knew nothing but how often each label occurs: what a real one must beat."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lite.objectives.base import Example


@dataclass(frozen=True)
class Baseline:
    """Of the labels that count in the loss."""

    entropy_nats: float  # loss of the held-out labels under the training labels' frequencies, nats per label
    accuracy: float  # share of the held-out labels that the most frequent training label gets right


def label_baseline(training: Iterable[Example], held_out: Iterable[Example], vocab_size: int) -> Baseline:
    """From samples of both sets. A label that no training sample has counts as if it had been seen once."""
    seen, asked = (_label_counts(examples, vocab_size) for examples in (training, held_out))
    smoothed = np.maximum(seen, 1.0)
    log_probability = np.log(smoothed / smoothed.sum())
    total = max(asked.sum(), 1.0)
    return Baseline(float(-(asked * log_probability).sum() / total), float(asked[seen.argmax()] / total))


def _label_counts(examples: Iterable[Example], vocab_size: int) -> npt.NDArray[np.float64]:
    counts = np.zeros(vocab_size)
    for example in examples:
        counts += np.bincount(example.labels, weights=example.loss_weights, minlength=vocab_size)
    return counts
