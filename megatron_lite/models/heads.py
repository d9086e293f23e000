"""Layers around the output head: the transform before it, the bias after it, the next-sentence head beside it.

Shapes: b micro-batch, s sequence, h hidden, v padded vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.models.initial import StackInit
from megatron_lite.models.mlp import activation_function
from megatron_lite.models.norms import build_norm
from megatron_lite.parallel.collectives import first_position
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.layers import ReplicatedLinear
from megatron_lite.parallel.sharding import Init, ShardSpec, sharded_parameter


class HeadTransform(nn.Module):
    """norm(activation(dense(x))), [b, s, h] or its slice [b, s/t, h] (BERT, arXiv 1810.04805)."""

    def __init__(self, model: ResolvedModel, context: ParallelContext, init: StackInit) -> None:
        super().__init__()
        hidden = model.hidden_size
        self.activation = activation_function(model.activation)
        self.dense = ReplicatedLinear(hidden, hidden, context, init=init.dense, on_slices=True)
        self.norm = build_norm(model, context)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(x)))


class HeadBias(nn.Module):
    """A bias on the logits [b, s, v/t], added in place: no other layer needs the logits without it.

    A separate layer, since a module that is tied between pipeline stages must hold only the tied weight.
    """

    def __init__(self, vocab_size: int, context: ParallelContext, *, padded_vocab_size: int) -> None:
        super().__init__()
        self.bias = sharded_parameter(ShardSpec((vocab_size,), 0, Init.zeros(), padded_vocab_size), context)

    def forward(self, logits: Tensor) -> Tensor:
        return logits.add_(self.bias)


class NextSentenceHead(nn.Module):
    """classifier(tanh(pooler(x at position 0))): [b, s, h] or its slice [b, s/t, h] -> [b, 2] on all ranks."""

    def __init__(self, model: ResolvedModel, context: ParallelContext, init: StackInit) -> None:
        super().__init__()
        hidden = model.hidden_size
        self.context = context
        self.pooler = ReplicatedLinear(hidden, hidden, context, init=init.dense, on_slices=False)
        self.classifier = ReplicatedLinear(hidden, 2, context, init=init.dense, on_slices=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.tanh(self.pooler(first_position(x, self.context))))
