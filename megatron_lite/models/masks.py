"""Which keys a query attends to, and attention under such masks.

Shapes: b micro-batch, s queries, k keys, n query heads and g query groups of this rank, d head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.rng import DropoutKey


class Visibility(NamedTuple):
    """What the samples of a micro-batch change about attention."""

    lengths: Tensor | None = None  # [b] int64, at least 1: keys from there on are padding
    prefix_lengths: Tensor | None = None  # [b] int64: keys before it are seen from everywhere
    position_bias: Tensor | None = None  # [1 or b, n, s, s]: added to the scores; it holds the rest as -inf


def self_attention_mask(length: int, visibility: Visibility, *, causal: bool) -> Tensor | None:
    """Bool or float, broadcastable to [b, n, s, s], as `scaled_dot_product_attention` takes it.

    None = nothing beyond `causal`. In a causal stack padding needs no mask: it lies behind everything whose loss
    counts.
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
    key: DropoutKey | None,
    context: ParallelContext,
    site: str,
) -> Tensor:
    """softmax(query key^T * scale, masked) value: [b, n, s, d]; key_heads and value are [b, g, k, d].

    Args:
        causal: where there is no mask, each position sees none after it.
        scale: None = 1 / sqrt(d).
        key: of the dropout masks on the probabilities; None = no dropout.
        site: tells the dropout masks of one layer apart.
    """
    grouped = query.shape[1] != key_heads.shape[1]
    settings = {"attn_mask": mask, "is_causal": causal and mask is None, "scale": scale, "enable_gqa": grouped}
    if key is None or dropout == 0.0:
        return F.scaled_dot_product_attention(query, key_heads, value, **settings)
    with context.rng.tensor_parallel(key, site):
        return F.scaled_dot_product_attention(query, key_heads, value, dropout_p=dropout, **settings)
