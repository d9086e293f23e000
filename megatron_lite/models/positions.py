"""Position embeddings: learned tables that are added to the embedding, and rotary embedding inside attention.

Shapes: b micro-batch, s sequence, t tensor-parallel size, h hidden, n heads, d head size.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.models.initial import StackInit
from megatron_lite.parallel.collectives import sum_gradients
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.sharding import ShardSpec, sharded_parameter


class PositionTable(nn.Module):
    """Adds the learned vector of each position (arXiv 1706.03762, section 3.5): [b, s, h] -> [b, s, h].

    Under sequence parallelism [b, s/t, h] -> [b, s/t, h]. A separate layer, like all that follow the word embedding, so
    that the word embedding holds only the weight that it shares with the head.
    """

    def __init__(self, model: ResolvedModel, context: ParallelContext, init: StackInit) -> None:
        super().__init__()
        self.context = context
        self.offset = model.position_offset
        shape = (model.position_offset + model.max_position_embeddings, model.hidden_size)
        self.weight = sharded_parameter(ShardSpec(shape, None, init.embedding, partial_gradient="sequence"), context)

    def forward(self, x: Tensor) -> Tensor:
        (weight,) = sum_gradients(self.context, self.weight)
        first = self.offset + _first_position(x, self.context)
        return x + weight[first : first + x.shape[1]]


class SegmentTable(nn.Module):
    """Adds the learned vector of each token's segment (arXiv 1810.04805): [b, s, h] -> [b, s, h], or its slice."""

    def __init__(self, model: ResolvedModel, context: ParallelContext, init: StackInit) -> None:
        super().__init__()
        self.context = context
        shape = (model.num_segments, model.hidden_size)
        self.weight = sharded_parameter(ShardSpec(shape, None, init.embedding, partial_gradient="sequence"), context)

    def forward(self, x: Tensor, segments: Tensor | None) -> Tensor:
        """`segments`: [b, s] int64, not sliced under sequence parallelism; None = all 0."""
        (weight,) = sum_gradients(self.context, self.weight)
        if segments is None:
            return x + weight[0]
        first = _first_position(x, self.context)
        return x + F.embedding(segments[:, first : first + x.shape[1]], weight)


def _first_position(x: Tensor, context: ParallelContext) -> int:
    """Position in the sequence of the first element of this rank's slice x [b, s/t, h]."""
    return context.tensor_rank * x.shape[1] if context.sequence_parallel else 0


Angles: TypeAlias = tuple[Tensor, Tensor]
"""cos and sin of the rotary embedding, each [s, d/2] fp32."""


class RotaryTable:
    """cos and sin of position x frequency in fp32, computed at first use and shared by all layers.

    Not a module and not a buffer: module.bfloat16() would round the angles.
    """

    def __init__(self, head_size: int, base: float) -> None:
        self.head_size = head_size
        self.base = base
        self._cached: Angles | None = None

    def __call__(self, seq_length: int, device: torch.device) -> Angles:
        """cos and sin, each [s, d/2] fp32: angle of position p and channel i is p / base^(2i/d) (arXiv 2104.09864)."""
        cached = self._cached
        if cached is None or cached[0].device != device or cached[0].shape[0] < seq_length:
            exponent = torch.arange(0, self.head_size, 2, dtype=torch.float32, device=device) / self.head_size
            positions = torch.arange(seq_length, dtype=torch.float32, device=device)
            angles = torch.outer(positions, 1.0 / self.base**exponent)
            cached = self._cached = angles.cos(), angles.sin()
        return cached[0][:seq_length], cached[1][:seq_length]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of channels (i, i + d/2) of x [b, s, g, n, d] by the angle of its position, in fp32.

    Not differentiable: the gradient of a rotation is the rotation by the opposite angle, which the caller applies.
    """
    cos, sin = (table[:, None, None] for table in (cos, sin))  # [s, 1, 1, d/2]
    first, second = x.float().chunk(2, -1)
    if torch.compiler.is_compiling():  # which fuses all of this, but does not trace `out`
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
    turned = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    turned_first, turned_second = turned.chunk(2, -1)
    torch.mul(first, cos, out=turned_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned_second).addcmul_(first, sin)
    return turned.to(x.dtype)
