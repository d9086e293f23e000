"""Dropout of activations with explicit keys, so that recomputation draws the same mask.

Shapes: b micro-batch, s sequence, h hidden, f inner channels of the MLP, t tensor-parallel size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.graph_ops import dropout_mask
from megatron_lite.parallel.rng import Key


def activation_dropout(x: Tensor, probability: float, key: Key | None, site: str, context: ParallelContext) -> Tensor:
    """Dropout on x, [b, s, h] replicated over the tensor-parallel group, or its slice of the sequence.

    Args:
        key: of this layer's forward pass; None = no dropout.
        site: distinguishes the masks within one layer.
    """
    if key is None or probability == 0.0:
        return x
    # Slices of the sequence need different masks on each tensor rank, replicated activations the same one.
    if isinstance(key, Tensor):
        rank = context.rng.tensor_rank if context.sequence_parallel else -1
        kept = dropout_mask(key, x.shape, x.dtype, x.device, probability, context.rng.seed, site, rank)
        return x * kept * (1.0 / (1.0 - probability))
    draw = context.rng.tensor_parallel if context.sequence_parallel else context.rng.replicated
    with draw(key, site):
        return F.dropout(x, probability)


def inner_dropout(x: Tensor, probability: float, key: Key | None, context: ParallelContext) -> Tensor:
    """Dropout on this rank's inner channels x [b, s, f/t] of an MLP.

    Every rank draws the mask [b, s, f] of all channels and takes its slice, so that the result does not depend on the
    layout; next to the MLP's matrix products the draw is cheap.
    """
    if key is None or probability == 0.0:
        return x
    whole = (*x.shape[:-1], context.tensor_size * x.shape[-1])
    if isinstance(key, Tensor):
        kept = dropout_mask(key, whole, x.dtype, x.device, probability, context.rng.seed, "mlp_inner", -1)
    else:
        with context.rng.replicated(key, "mlp_inner"):
            if context.tensor_size == 1:
                return F.dropout(x, probability)
            kept = F.dropout(x.new_ones(whole), probability) > 0
    own = kept.chunk(context.tensor_size, -1)[context.tensor_rank]  # the backward pass saves one byte per channel
    return x * own.contiguous() * (1.0 / (1.0 - probability))


class HiddenDropout(nn.Module):
    """Dropout as a separate layer, before or after the blocks: [b, s, h], or its slice [b, s/t, h]."""

    def __init__(self, probability: float, context: ParallelContext, name: str, site: str) -> None:
        super().__init__()
        self.probability = probability
        self.context = context
        self.name = name
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return activation_dropout(x, self.probability, self.context.rng.next_key(self.name), self.site, self.context)
