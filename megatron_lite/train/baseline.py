"""The unigram baseline: the loss of a model that knows only how often each label occurs. A trained model must beat it.

Special tokens among the labels (sentinels, end of document) follow fixed patterns that a model learns in its first
steps. So the baseline predicts them for free: otherwise a T5, a quarter of whose labels are special, would seem to have
learned a nat before it knows a word.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_lite.data.special import Vocabulary
from megatron_lite.objectives.base import Example


@dataclass(frozen=True)
class Baseline:
    """Figures over the labels that count in the loss."""

    entropy_nats: float  # loss of the held-out labels by the training labels' frequencies, nats per label
    accuracy: float  # share of the held-out labels that are special, or the most frequent training label
    loss: float  # entropy_nats, plus the entropy of the samples' classes if they have one


def label_baseline(training: Iterable[Example], held_out: Iterable[Example], vocabulary: Vocabulary) -> Baseline:
    """The baseline from samples of both sets. A label without any training sample counts as if seen once."""
    seen, classes = _counts(training, vocabulary.size)
    asked, _ = _counts(held_out, vocabulary.size)
    total = max(asked.sum(), 1.0)
    given = 0.0
    if vocabulary.is_special is not None:
        given = float(asked[vocabulary.is_special].sum())
        seen[vocabulary.is_special] = asked[vocabulary.is_special] = 0.0
    smoothed = np.maximum(seen, 1.0)
    log_probability = np.log(smoothed / smoothed.sum())
    entropy = float(-(asked * log_probability).sum() / total)
    accuracy = float((given + asked[seen.argmax()]) / total)
    return Baseline(entropy, accuracy, entropy + _class_entropy(classes))


def _counts(examples: Iterable[Example], vocab_size: int) -> tuple[npt.NDArray[np.float64], Counter[int]]:
    """How often each label [vocab_size] and each class of a whole sample occurs; streams through the samples."""
    labels, classes = np.zeros(vocab_size), Counter[int]()
    for example in examples:
        labels += np.bincount(example.labels, weights=example.loss_weights, minlength=vocab_size)
        if example.sequence_label is not None:
            classes[example.sequence_label] += 1
    return labels, classes


def _class_entropy(classes: Counter[int]) -> float:
    """Entropy of the samples' classes, nats; 0 if they have none."""
    shares = [count / classes.total() for count in classes.values()]
    return -sum(share * math.log(share) for share in shares)
