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
    position_bias: Tensor | None = None  # [1, n, s, s]: added to the scores


def self_attention_mask(length: int, visibility: Visibility, *, causal: bool) -> Tensor | None:
    """Bool or float, broadcastable to [b, n, s, s], as `scaled_dot_product_attention` takes it.

    None = nothing beyond `causal`. In a causal stack padding needs no mask: it lies behind everything whose loss
    counts.
    """
    lengths, prefix_lengths, bias = visibility
    if not causal:
        seen = None if lengths is None else key_mask(length, lengths)
    elif prefix_lengths is not None:
        seen = _not_after(length, prefix_lengths.device) | key_mask(length, prefix_lengths)  # [b, 1, s, s]
    else:
        seen = None if bias is None else _not_after(length, bias.device)
    if bias is None or seen is None:
        return seen if bias is None else bias
    return torch.where(seen, bias, -torch.inf)


def key_mask(num_keys: int, lengths: Tensor) -> Tensor:
    """[b] -> [b, 1, 1, k]: True for each sample's first `lengths` keys."""
    return (torch.arange(num_keys, device=lengths.device) < lengths[:, None])[:, None, None]


def _not_after(length: int, device: torch.device) -> Tensor:
    """[s, s]: True where the key is not after the query."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril_()


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
