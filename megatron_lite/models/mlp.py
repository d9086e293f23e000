"""The feed-forward part of a block, its inner channels split over the tensor-parallel group.

Shapes: b micro-batch, s sequence, h hidden, f inner channels, t tensor-parallel size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.config.derived import residual_init_std
from megatron_lite.config.schema import Activation, ModelConfig
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.layers import ColumnParallelLinear, RowParallelLinear


class MLP(nn.Module):
    """down(gelu(up(x))): [b, s, h] -> [b, s, h] ([b, s/t, h] under sequence parallelism)."""

    def __init__(self, model: ModelConfig, context: ParallelContext) -> None:
        super().__init__()
        assert model.ffn_hidden_size is not None  # by complete_model
        self.approximate = "tanh" if model.activation is Activation.gelu_tanh else "none"
        self.up = ColumnParallelLinear(
            model.hidden_size, model.ffn_hidden_size, context, bias=model.mlp_bias, init_std=model.init_std
        )
        self.down = _down(model, context)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202), gate and up in one parameter [2, f, h] and one product."""

    def __init__(self, model: ModelConfig, context: ParallelContext) -> None:
        super().__init__()
        assert model.ffn_hidden_size is not None  # by complete_model
        self.gate_up = ColumnParallelLinear(
            model.hidden_size, model.ffn_hidden_size, context, bias=model.mlp_bias, init_std=model.init_std, stacked=2
        )
        self.down = _down(model, context)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)  # [b, s, f/t] each
        return self.down(F.silu(gate) * up)


def _down(model: ModelConfig, context: ParallelContext) -> RowParallelLinear:
    assert model.ffn_hidden_size is not None  # by complete_model
    return RowParallelLinear(
        model.ffn_hidden_size,
        model.hidden_size,
        context,
        bias=model.mlp_bias,
        init_std=residual_init_std(model),
    )


def build_mlp(model: ModelConfig, context: ParallelContext) -> nn.Module:
    """The feed-forward part that the configuration asks for."""
    return GatedMLP(model, context) if model.activation is Activation.swiglu else MLP(model, context)
