"""How well a model would do that knew nothing but how often each label occurs: what a real one must beat.

Special tokens among the labels (sentinels, the end) are a matter of counting, not of language, and a model has learned
them in its first steps. So the baseline gets them for nothing: else a T5, a quarter of whose labels they are, would
seem to have learned a nat before it knows a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lite.data.special import Vocabulary
from megatron_lite.objectives.base import Example


@dataclass(frozen=True)
class Baseline:
    """Of the labels that count in the loss."""

    entropy_nats: float  # loss of the held-out labels by the training labels' frequencies, nats per label
    accuracy: float  # share of the held-out labels that are special, or the most frequent training label
    loss: float  # entropy_nats, and that of the samples' classes where they have one


def label_baseline(training: Iterable[Example], held_out: Iterable[Example], vocabulary: Vocabulary) -> Baseline:
    """From samples of both sets. A label that no training sample has counts as if it had been seen once."""
    training, held_out = list(training), list(held_out)
    seen, asked = (_label_counts(examples, vocabulary.size) for examples in (training, held_out))
    total = max(asked.sum(), 1.0)
    given = 0.0
    if vocabulary.is_special is not None:
        given = float(asked[vocabulary.is_special].sum())
        seen[vocabulary.is_special] = asked[vocabulary.is_special] = 0.0
    smoothed = np.maximum(seen, 1.0)
    log_probability = np.log(smoothed / smoothed.sum())
    entropy = float(-(asked * log_probability).sum() / total)
    accuracy = float((given + asked[seen.argmax()]) / total)
    return Baseline(entropy, accuracy, entropy + _class_entropy(training))


def _class_entropy(examples: Sequence[Example]) -> float:
    """Of the samples' classes, nats; 0 where they have none."""
    classes = [example.sequence_label for example in examples if example.sequence_label is not None]
    shares = np.unique(classes, return_counts=True)[1] / max(len(classes), 1)
    return float(-(shares * np.log(shares)).sum())


def _label_counts(examples: Iterable[Example], vocab_size: int) -> npt.NDArray[np.float64]:
    """[vocab_size]: how often each label counts."""
    counts = np.zeros(vocab_size)
    for example in examples:
        counts += np.bincount(example.labels, weights=example.loss_weights, minlength=vocab_size)
    return counts
