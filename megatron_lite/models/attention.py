"""Self-attention with grouped query heads (arXiv 2305.13245), its heads split over the tensor-parallel group.

Shapes: b micro-batch, s sequence, h hidden, t tensor-parallel size, n query heads and g query groups of this rank,
q query heads of one group (n = g q), d head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.models.initial import StackInit
from megatron_lite.models.masks import Visibility, masked_attention, self_attention_mask
from megatron_lite.models.positions import Angles, rotate
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_lite.parallel.rng import Key

_LONGEST_SHORT_SEQUENCE = 512
"""Longest sequence for which `short_causal_attention` is used on CPUs. CPU-ms of forward and backward, torch's
scaled_dot_product_attention -> ours, one Zen 4 thread, 6 heads of 64: at 4 x 128 tokens fp32 16 -> 6, bf16 13 -> 6; at
4 x 256 31 -> 19, 25 -> 18; at 4 x 512 94 -> 58, 79 -> 57; at 2 x 1024 128 -> 102, 115 -> 101. It saves the
probabilities, up to 4 n s^2 bytes per sample, so beyond 512 the small gain is not worth the memory."""

_QUERY_BLOCK = 128

_ALL_VISIBLE = Visibility()


class Attention(nn.Module):
    """[b, s, h] -> [b, s, h] ([b, s/t, h] under sequence parallelism).

    The rows of the fused qkv weight are ordered by group, [groups, q + 2, d]: the group's query heads, its key head,
    its value head. So every contiguous slice of whole groups is a smaller attention of the same form, as tensor
    parallelism needs.
    """

    def __init__(
        self,
        model: ResolvedModel,
        context: ParallelContext,
        init: StackInit,
        *,
        causal: bool,
        recompute: bool,
    ) -> None:
        super().__init__()
        groups, heads, self.head_size = model.num_query_groups, model.num_attention_heads, model.head_size
        self.context = context
        self.causal = causal
        self.scale = None if model.attention_scale else 1.0
        self.recompute = recompute
        self.dropout = model.attention_dropout
        self.heads_per_group = heads // groups
        self.qkv = ColumnParallelLinear(
            model.hidden_size,
            groups * (self.heads_per_group + 2) * self.head_size,
            context,
            bias=model.attention_bias,
            init=init.qkv,
        )
        self.projection = RowParallelLinear(
            heads * self.head_size,
            model.hidden_size,
            context,
            bias=model.attention_bias,
            init=init.projection,
        )

    def forward(
        self, x: Tensor, key: Key | None, visibility: Visibility = _ALL_VISIBLE, angles: Angles | None = None
    ) -> Tensor:
        """
        Args:
            key: of the dropout masks; None = no dropout.
            angles: of the rotary embedding; None = positions are in x.
        """
        qkv = self.qkv(x)  # [b, s, g (q + 2) d]
        if self.recompute and torch.is_grad_enabled():
            attended = checkpoint(
                self._attend, qkv, key, visibility, angles, use_reentrant=False, preserve_rng_state=False
            )
        else:
            attended = self._attend(qkv, key, visibility, angles)
        return self.projection(attended)

    def _attend(
        self, qkv: Tensor, key: Key | None, visibility: Visibility = _ALL_VISIBLE, angles: Angles | None = None
    ) -> Tensor:
        """[b, s, g (q + 2) d] -> [b, s, n d]."""
        batch, length, _ = qkv.shape
        heads = _SplitHeads.apply(qkv.view(batch, length, -1, self.heads_per_group + 2, self.head_size), angles)
        query, key_heads, value = (part.transpose(1, 2) for part in heads)  # [b, n or g, s, d]
        mask = self_attention_mask(length, visibility, causal=self.causal)
        return self._core(query, key_heads, value, mask, key).transpose(1, 2).flatten(2)

    def _core(self, query: Tensor, key_heads: Tensor, value: Tensor, mask: Tensor | None, key: Key | None) -> Tensor:
        """softmax(masked(query key^T / sqrt(d))) value: [b, n, s, d]; key_heads and value are [b, g, s, d]."""
        plain = self.causal and mask is None and self.scale is None and (key is None or self.dropout == 0.0)
        if plain and query.device.type == "cpu" and query.shape[2] <= _LONGEST_SHORT_SEQUENCE:
            return short_causal_attention(query, key_heads, value)
        return masked_attention(
            query,
            key_heads,
            value,
            mask,
            causal=self.causal,
            scale=self.scale,
            dropout=self.dropout,
            key=key,
            context=self.context,
            site="attention",
        )


def short_causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(causal(query key^T / sqrt(d))) value of short sequences on a CPU, computed in fp32 for every dtype.

    torch's own CPU kernel splits such sequences into tiles too small for fast matrix products. This multiplies one
    block of queries at a time with all keys up to the block's end, and skips the masked scores of later blocks. In bf16
    its errors, of output and gradients, are below those of torch's kernel.

    Args:
        query: [b, n, s, d].
        key, value: [b, g, s, d].
    Returns:
        [b, n, s, d]
    """
    return _ShortCausalAttention.apply(query, key, value)


class _ShortCausalAttention(torch.autograd.Function):
    """With P = softmax(S) and out = P V: dV = P^T dout, dP = dout V^T, dS = P (dP - sum(P dP)) (arXiv 2205.14135, B.2).

    The q query heads of a group become rows of one product: [b g, q l, d] with [b g, ., d], for blocks of l queries.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        exact = torch.promote_types(query.dtype, torch.float32)
        scale = query.shape[-1] ** -0.5
        keys, values = (part.flatten(0, 1).to(exact) for part in (key, value))  # [b g, s, d]
        queries = query.unflatten(1, (key.shape[1], -1)).flatten(0, 1).to(exact) * scale  # [b g, q, s, d]
        out = torch.empty_like(queries)
        probabilities = []
        for start, stop in _query_blocks(queries.shape[2]):
            rows = queries[:, :, start:stop].flatten(1, 2)  # [b g, q l, d]
            scores = rows @ keys[:, :stop].transpose(1, 2)  # [b g, q l, stop]
            future = scores.new_full((stop - start, stop - start), -math.inf).triu_(1)
            scores.unflatten(1, (-1, stop - start))[..., start:] += future
            probabilities.append(torch.softmax(scores, -1))
            out[:, :, start:stop] = (probabilities[-1] @ values[:, :stop]).unflatten(1, (-1, stop - start))
        ctx.save_for_backward(queries, keys, values, *probabilities)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape)
        return out.view(query.shape).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        queries, keys, values, *probabilities = ctx.saved_tensors
        grads = grad.reshape(queries.shape).to(queries.dtype)  # [b g, q, s, d]
        grad_queries, grad_keys, grad_values = (torch.zeros_like(part) for part in (queries, keys, values))
        for (start, stop), probability in zip(_query_blocks(queries.shape[2]), probabilities, strict=True):
            rows, grad_rows = (part[:, :, start:stop].flatten(1, 2) for part in (queries, grads))  # [b g, q l, d]
            grad_values[:, :stop].baddbmm_(probability.transpose(1, 2), grad_rows)
            weighted = (grad_rows @ values[:, :stop].transpose(1, 2)).mul_(probability)  # P dP
            grad_scores = weighted.addcmul_(probability, weighted.sum(-1, keepdim=True), value=-1)
            grad_queries[:, :, start:stop] = (grad_scores @ keys[:, :stop]).unflatten(1, (-1, stop - start))
            grad_keys[:, :stop].baddbmm_(grad_scores.transpose(1, 2), rows)
        query_shape, key_shape = ctx.shapes
        parts = ((grad_queries.mul_(ctx.scale), query_shape), (grad_keys, key_shape), (grad_values, key_shape))
        return tuple(part.view(shape).to(grad.dtype) for part, shape in parts)


def _query_blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + _QUERY_BLOCK, length)) for start in range(0, length, _QUERY_BLOCK)]


class _SplitHeads(torch.autograd.Function):
    """qkv [b, s, g, q + 2, d] -> rotated query [b, s, n, d], rotated key [b, s, g, d], value [b, s, g, d].

    One autograd function, so that the backward pass writes the three gradients directly into one tensor.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
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
