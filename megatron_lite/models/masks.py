"""Which keys a query attends to, and attention under such masks.

Shapes: b micro-batch, s queries, k keys, n query heads and g query groups of this rank, d head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.graph_ops import dropping_attention
from megatron_lite.parallel.rng import Key


class Visibility(NamedTuple):
    """What differs between the samples of a micro-batch in what attention may see."""

    lengths: Tensor | None = None  # [b] int64, at least 1: keys from this position on are padding
    prefix_lengths: Tensor | None = None  # [b] int64: keys before this position are visible to every query
    position_bias: Tensor | None = None  # [1 or b, n, s, s]: added to the scores; it already contains the mask as -inf


def self_attention_mask(length: int, visibility: Visibility, *, causal: bool) -> Tensor | None:
    """Bool or float mask, broadcastable to [b, n, s, s], for `scaled_dot_product_attention`.

    None = no mask beyond `causal`. A causal stack needs no padding mask: padding comes after all positions that count
    in the loss.
    """
    lengths, prefix_lengths, bias = visibility
    if bias is not None:
        return bias
    if not causal:
        return None if lengths is None else key_mask(length, lengths)
    if prefix_lengths is None:
        return None
    not_after = torch.ones(length, length, dtype=torch.bool, device=prefix_lengths.device).tril_()
    return not_after | key_mask(length, prefix_lengths)  # [b, 1, s, s]


def key_mask(num_keys: int, lengths: Tensor) -> Tensor:
    """[b] -> [b, 1, 1, k]: True for each sample's first `lengths` keys."""
    return (torch.arange(num_keys, device=lengths.device) < lengths[:, None])[:, None, None]


def masked_attention(
    query: Tensor,
    key_heads: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float | None,
    dropout: float,
    key: Key | None,
    context: ParallelContext,
    site: str,
) -> Tensor:
    """softmax(query key^T * scale, masked) value: [b, n, s, d]; key_heads and value are [b, g, k, d].

    Args:
        causal: used where there is no mask: no position sees a later one.
        scale: None = 1 / sqrt(d).
        key: of the dropout masks on the attention probabilities; None = no dropout.
        site: distinguishes the dropout masks within one layer.
    """
    grouped = query.shape[1] != key_heads.shape[1]
    settings = {"attn_mask": mask, "is_causal": causal and mask is None, "scale": scale, "enable_gqa": grouped}
    if key is None or dropout == 0.0:
        return F.scaled_dot_product_attention(query, key_heads, value, **settings)
    if isinstance(key, Tensor):
        seed, rank = context.rng.seed, context.rng.tensor_rank
        attended = dropping_attention(
            query, key_heads, value, mask, key, causal, scale, dropout, seed, site, rank
        )  # [b, s, n, d]
        return attended.transpose(1, 2)
    with context.rng.tensor_parallel(key, site):
        return F.scaled_dot_product_attention(query, key_heads, value, dropout_p=dropout, **settings)
