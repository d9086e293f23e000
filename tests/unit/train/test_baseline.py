"""What frequencies alone are worth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_lite.data.special import SpecialTokens, Vocabulary
from megatron_lite.objectives.base import Example
from megatron_lite.train.baseline import label_baseline

SPECIAL = np.array([True, False, False, False])


def example(labels: list[int], weights: list[float] | None = None) -> Example:
    given = [1.0] * len(labels) if weights is None else weights
    return Example((np.array(labels),), np.array(labels), np.array(given, np.float32))


def test_entropy_and_most_frequent_label() -> None:
    found = label_baseline([example([1, 1, 1, 2])], [example([1, 2])], Vocabulary(3))
    assert found.accuracy == 0.5
    # token 0 was never seen, and counts as if once: 3, 1 and 1 of 5
    assert found.entropy_nats == pytest.approx(-(math.log(3 / 5) + math.log(1 / 5)) / 2)


def test_labels_without_weight_do_not_count() -> None:
    found = label_baseline([example([1, 2, 2, 2], [1, 0, 0, 0])], [example([1, 2], [1, 0])], Vocabulary(3))
    assert found.accuracy == 1.0


def test_classes_of_samples_add_their_entropy() -> None:
    samples = [example([1, 2])._replace(sequence_label=label) for label in (0, 1)]
    found = label_baseline(samples, samples, Vocabulary(3))
    assert found.loss == pytest.approx(found.entropy_nats + math.log(2))
    without = label_baseline([example([1, 2])], [example([1, 2])], Vocabulary(3))
    assert without.loss == without.entropy_nats


def test_special_labels_are_given_away() -> None:
    vocabulary = Vocabulary(4, SpecialTokens(eod=0), is_special=SPECIAL)
    with_end = label_baseline([example([1, 1, 2, 0])], [example([1, 2, 0, 0])], vocabulary)
    without = label_baseline([example([1, 1, 2])], [example([1, 2])], vocabulary)
    assert with_end.accuracy == 0.75
    assert with_end.entropy_nats == pytest.approx(without.entropy_nats / 2)
