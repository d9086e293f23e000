"""The feed-forward part of a block, its inner channels split over the tensor-parallel group.

Shapes: b micro-batch, s sequence, h hidden, f inner channels, t tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.config.schema import Activation
from megatron_lite.models.dropout import inner_dropout
from megatron_lite.models.gelu import gelu_tanh
from megatron_lite.models.initial import StackInit
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_lite.parallel.rng import Key

_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.relu: F.relu,
    Activation.gelu: F.gelu,
    Activation.gelu_tanh: gelu_tanh,
    Activation.swiglu: F.silu,
    Activation.geglu: gelu_tanh,
}


def activation_function(activation: Activation) -> Callable[[Tensor], Tensor]:
    """The activation as a function of one argument; for a gated activation, the function applied to its gate."""
    return _FUNCTIONS[activation]


class MLP(nn.Module):
    """The feed-forward part of a block: [b, s, h] -> [b, s, h] ([b, s/t, h] under sequence parallelism).

    down(dropout(activation(up(x)))), or if the activation is gated down(dropout(activation(gate(x)) * up(x)))
    (arXiv 2002.05202), with gate and up in one parameter [2, f, h].
    """

    def __init__(self, model: ResolvedModel, context: ParallelContext, init: StackInit) -> None:
        super().__init__()
        hidden, inner, bias = model.hidden_size, model.ffn_hidden_size, model.mlp_bias
        self.context = context
        self.dropout = model.ffn_dropout
        self.activation = activation_function(model.activation)
        self.is_gated = model.activation.is_gated
        if self.is_gated:
            self.gate_up = ColumnParallelLinear(hidden, inner, context, bias=bias, init=init.dense, stacked=2)
        else:
            self.up = ColumnParallelLinear(hidden, inner, context, bias=bias, init=init.dense)
        self.down = RowParallelLinear(inner, hidden, context, bias=bias, init=init.down)

    def forward(self, x: Tensor, key: Key | None = None) -> Tensor:
        """`key`: of the dropout mask; None = no dropout."""
        if self.is_gated:
            gate, up = self.gate_up(x).chunk(2, -1)  # [b, s, f/t] each
            inner = self.activation(gate) * up
        else:
            inner = self.activation(self.up(x))
        return self.down(inner_dropout(inner, self.dropout, key, self.context))
