"""The denominators of a loss over tokens and of one over samples."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.data.samples.batch import MicroBatch
from megatron_lite.engine.loss_weights import scale_loss_weights, targets_of
from megatron_lite.parallel.context import ParallelContext

TOKENS = torch.zeros(2, 3, dtype=torch.int64)


def batch(weights: list[list[float]], sequence_weights: list[float] | None = None) -> MicroBatch:
    if sequence_weights is None:
        return MicroBatch((TOKENS,), TOKENS, torch.tensor(weights))
    return MicroBatch((TOKENS,), TOKENS, torch.tensor(weights), TOKENS[:, 0], torch.tensor(sequence_weights))


def test_mean_of_micro_batches_is_the_mean_over_tokens() -> None:
    uneven = [batch([[1, 0, 0], [0, 0, 0]]), batch([[1, 1, 1], [1, 1, 0.5]])]
    scaled = scale_loss_weights(uneven, ParallelContext.single())
    sums = [float(b.loss_weights.sum()) for b in scaled]
    assert sum(sums) / len(scaled) == pytest.approx(1.0)
    assert sums[1] / sums[0] == pytest.approx(5.5)
    assert all(b.sequence_weights is None for b in scaled)
    assert len(targets_of(scaled[0])) == 2


def test_samples_have_a_denominator_of_their_own() -> None:
    mixed = [batch([[1, 0, 0], [0, 0, 0]], [1, 1]), batch([[1, 1, 1], [1, 1, 1]], [1, 1])]
    scaled = scale_loss_weights(mixed, ParallelContext.single())
    assert [b.sequence_weights.tolist() for b in scaled] == [[0.5, 0.5], [0.5, 0.5]]
    assert sum(float(b.loss_weights.sum()) for b in scaled) / 2 == pytest.approx(1.0)
    assert len(targets_of(scaled[0])) == 4


def test_batch_without_a_counted_token() -> None:
    (scaled,) = scale_loss_weights([batch([[0, 0, 0], [0, 0, 0]])], ParallelContext.single())
    assert scaled.loss_weights.sum() == 0
