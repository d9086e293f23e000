"""Layers around the output head: the transform before it, the bias of its logits, the next-sentence head beside it.

Shapes: b micro-batch, s sequence, h hidden, v padded vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.models.activations import Head
from megatron_lite.models.initial import StackInit
from megatron_lite.models.mlp import activation_function
from megatron_lite.models.norms import build_norm
from megatron_lite.parallel.collectives import first_position
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.layers import HeadUse, ReplicatedLinear
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
    """A bias on the logits [b, s, v/t]. `forward` passes it to what the head is used for, together with the weight.

    A separate layer, since a module that is tied between pipeline stages must hold only the tied weight.
    """

    def __init__(self, vocab_size: int, context: ParallelContext, *, padded_vocab_size: int) -> None:
        super().__init__()
        self.bias = sharded_parameter(ShardSpec((vocab_size,), 0, Init.zeros(), padded_vocab_size), context)

    def forward(self, hidden: Tensor, head: Head, use: HeadUse) -> Any:
        # A function, not a `partial`: ZeRO-3 warns of arguments of unknown types.
        return head(hidden, lambda x, weights: use(x, weights._replace(bias=self.bias)))


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
