"""Causal self-attention with grouped query heads (arXiv 2305.13245), its heads split over the tensor-parallel group.

Shapes: b micro-batch, s sequence, h hidden, t tensor-parallel size, n query heads and g query groups of this rank,
q query heads of one group (n = g q), d head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from megatron_lite.config.schema import ModelConfig
from megatron_lite.models.positions import RotaryTable, rotate
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_lite.parallel.rng import DropoutKey


class Attention(nn.Module):
    """[b, s, h] -> [b, s, h] ([b, s/t, h] under sequence parallelism).

    The rows of the fused qkv weight are ordered by group, [groups, q + 2, d]: the group's query heads, its key head,
    its value head. So every contiguous slice that holds whole groups is a smaller attention of the same form.
    """

    def __init__(
        self, model: ModelConfig, context: ParallelContext, *, rotary: RotaryTable | None, recompute: bool
    ) -> None:
        super().__init__()
        assert model.num_query_groups is not None  # by complete_model
        assert model.head_size is not None
        groups, heads, self.head_size = model.num_query_groups, model.num_attention_heads, model.head_size
        self.context = context
        self.rotary = rotary
        self.recompute = recompute
        self.dropout = model.attention_dropout
        self.heads_per_group = heads // groups
        self.qkv = ColumnParallelLinear(
            model.hidden_size,
            groups * (self.heads_per_group + 2) * self.head_size,
            context,
            bias=model.attention_bias,
            init_std=model.init_std,
        )
        self.projection = RowParallelLinear(
            heads * self.head_size,
            model.hidden_size,
            context,
            bias=model.attention_bias,
            init_std=model.init_std / (2 * model.num_layers) ** 0.5,
        )

    def forward(self, x: Tensor, key: DropoutKey | None) -> Tensor:
        """`key`: of the dropout masks; None = no dropout."""
        qkv = self.qkv(x)  # [b, s, g (q + 2) d]
        if self.recompute and torch.is_grad_enabled():
            attended = checkpoint(self._attend, qkv, key, use_reentrant=False, preserve_rng_state=False)
        else:
            attended = self._attend(qkv, key)
        return self.projection(attended)

    def _attend(self, qkv: Tensor, key: DropoutKey | None) -> Tensor:
        """[b, s, g (q + 2) d] -> [b, s, n d]."""
        batch, length, _ = qkv.shape
        angles = None if self.rotary is None else self.rotary(length, qkv.device)
        heads = _SplitHeads.apply(qkv.view(batch, length, -1, self.heads_per_group + 2, self.head_size), angles)
        query, key_heads, value = (part.transpose(1, 2) for part in heads)  # [b, n or g, s, d]
        return self._core(query, key_heads, value, key).transpose(1, 2).flatten(2)

    def _core(self, query: Tensor, key_heads: Tensor, value: Tensor, key: DropoutKey | None) -> Tensor:
        """softmax(causal(query key^T / sqrt(d))) value: [b, n, s, d]; key_heads and value are [b, g, s, d]."""
        grouped = self.heads_per_group > 1
        if key is None or self.dropout == 0.0:
            return F.scaled_dot_product_attention(query, key_heads, value, is_causal=True, enable_gqa=grouped)
        with self.context.rng.tensor_parallel(key, "attention"):
            return F.scaled_dot_product_attention(
                query, key_heads, value, is_causal=True, enable_gqa=grouped, dropout_p=self.dropout
            )


class _SplitHeads(torch.autograd.Function):
    """qkv [b, s, g, q + 2, d] -> rotated query [b, s, n, d], rotated key [b, s, g, d], value [b, s, g, d].

    One function, so that the backward pass writes the three gradients to their places in one tensor once.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        ctx.angles = angles
        queries_keys, value = qkv[..., :-1, :], qkv[..., -1, :]
        if angles is not None:
            queries_keys = rotate(queries_keys, *angles)
        return queries_keys[..., :-1, :].flatten(2, 3), queries_keys[..., -1, :], value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor, None]:
        by_group = grad_query.unflatten(2, (grad_key.shape[2], -1))  # [b, s, g, q, d]
        grad = torch.cat([by_group, grad_key.unsqueeze(3), grad_value.unsqueeze(3)], dim=3)
        if ctx.angles is not None:
            cos, sin = ctx.angles
            queries_keys = grad[..., :-1, :]
            queries_keys.copy_(rotate(queries_keys, cos, -sin))
        return grad, None
