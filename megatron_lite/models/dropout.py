"""Dropout of activations with explicit keys, so that recomputation draws the same mask."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.rng import DropoutKey


def activation_dropout(
    x: Tensor, probability: float, key: DropoutKey | None, site: str, context: ParallelContext
) -> Tensor:
    """Dropout on x, [b, s, h] held by all ranks of the tensor-parallel group, or its slice of the sequence.

    Args:
        key: of this layer's forward pass; None = no dropout.
        site: tells the masks of one layer apart.
    """
    if key is None or probability == 0.0:
        return x
    draw = context.rng.tensor_parallel if context.sequence_parallel else context.rng.replicated
    with draw(key, site):
        return F.dropout(x, probability)
