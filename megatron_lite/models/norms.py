"""LayerNorm and RMSNorm over the hidden dimension.

Shapes: b micro-batch, s sequence, t tensor-parallel size, h hidden. Under sequence parallelism x is [b, s/t, h].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.config.schema import ModelConfig, Normalization
from megatron_lite.parallel.collectives import sum_gradients
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.sharding import Init, ShardSpec, sharded_parameter


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * weight + bias; statistics in fp32 (arXiv 1607.06450)."""

    def __init__(self, hidden_size: int, epsilon: float, context: ParallelContext) -> None:
        super().__init__()
        self.context = context
        self.epsilon = epsilon
        self.weight = sharded_parameter(ShardSpec((hidden_size,), None, Init.ones()), context)
        self.bias = sharded_parameter(ShardSpec((hidden_size,), None, Init.zeros()), context)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = sum_gradients(self.context, self.weight, self.bias)
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.epsilon)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight; statistics in fp32 (arXiv 1910.07467)."""

    def __init__(self, hidden_size: int, epsilon: float, context: ParallelContext) -> None:
        super().__init__()
        self.context = context
        self.epsilon = epsilon
        self.weight = sharded_parameter(ShardSpec((hidden_size,), None, Init.ones()), context)

    def forward(self, x: Tensor) -> Tensor:
        (weight,) = sum_gradients(self.context, self.weight)
        return F.rms_norm(x, x.shape[-1:], weight, self.epsilon)


def build_norm(model: ModelConfig, context: ParallelContext) -> nn.Module:
    """The norm that the configuration asks for."""
    norm = RMSNorm if model.normalization is Normalization.rmsnorm else LayerNorm
    return norm(model.hidden_size, model.norm_epsilon, context)
