"""A decoder's attention to the encoder's output, with heads split over the tensor-parallel group.

Shapes: b micro-batch, s positions of the decoder, e of the encoder, h hidden, t tensor-parallel size, n query heads and
g query groups of this rank, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.models.initial import StackInit
from megatron_lite.models.masks import key_mask, masked_attention
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_lite.parallel.rng import Key


class CrossAttention(nn.Module):
    """[b, s, h], memory [b, e, h] -> [b, s, h] ([b, s/t, h] and [b, e/t, h] under sequence parallelism)."""

    def __init__(self, model: ResolvedModel, context: ParallelContext, init: StackInit, *, recompute: bool) -> None:
        super().__init__()
        hidden, bias = model.hidden_size, model.attention_bias
        inner, groups = model.num_attention_heads * model.head_size, model.num_query_groups * model.head_size
        self.context = context
        self.head_size = model.head_size
        self.scale = None if model.attention_scale else 1.0
        self.dropout = model.attention_dropout
        self.recompute = recompute
        self.query = ColumnParallelLinear(hidden, inner, context, bias=bias, init=init.query)
        self.key_value = ColumnParallelLinear(hidden, groups, context, bias=bias, init=init.dense, stacked=2)
        self.projection = RowParallelLinear(inner, hidden, context, bias=bias, init=init.projection)

    def forward(self, x: Tensor, memory: Tensor, lengths: Tensor | None, key: Key | None) -> Tensor:
        """
        Args:
            lengths: [b] positions of memory that are not padding, at least 1; None = all.
            key: of the dropout masks; None = no dropout.
        """
        query, key_value = self.query(x), self.key_value(memory)  # [b, s, n d], [b, e, 2 g d]
        if self.recompute and torch.is_grad_enabled():
            attended = checkpoint(
                self._attend, query, key_value, lengths, key, use_reentrant=False, preserve_rng_state=False
            )
        else:
            attended = self._attend(query, key_value, lengths, key)
        return self.projection(attended)

    def _attend(self, query: Tensor, key_value: Tensor, lengths: Tensor | None, key: Key | None) -> Tensor:
        """[b, s, n d], [b, e, 2 g d] -> [b, s, n d]."""
        by_head = [x.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for x in (query, *key_value.chunk(2, -1))]
        query, key_heads, value = by_head  # [b, n, s, d], [b, g, e, d], [b, g, e, d]
        mask = None if lengths is None else key_mask(key_value.shape[1], lengths)
        attended = masked_attention(
            query,
            key_heads,
            value,
            mask,
            causal=False,
            scale=self.scale,
            dropout=self.dropout,
            key=key,
            context=self.context,
            site="cross_attention",
        )
        return attended.transpose(1, 2).flatten(2)
