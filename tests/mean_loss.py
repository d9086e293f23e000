"""The mean loss over all tokens of a batch, as a run computes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_lite.models.flat import FlatModel
from megatron_lite.objectives.loss import TokenLoss
from megatron_lite.parallel.context import ParallelContext


def mean_loss(
    model: FlatModel, inputs: Sequence[Tensor], labels: Tensor, context: ParallelContext, vocab_size: int
) -> Tensor:
    """A collective of the tensor-parallel group."""
    targets = labels, torch.full(labels.shape, 1.0 / labels.numel())
    return model(*inputs, end=lambda x: TokenLoss(context, vocab_size)(x, targets))
