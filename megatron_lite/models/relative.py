"""Relative positions as a bias on attention scores, learned for buckets of distances (T5, arXiv 1910.10683, 2.1).

Shapes: b micro-batch, s sequence, n attention heads of this rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.models.initial import StackInit
from megatron_lite.models.masks import key_mask
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.sharding import ShardSpec, sharded_parameter


class RelativeBias(nn.Module):
    """Length s -> [1 or b, n, s, s] for all blocks of a stack; the heads are split over the tensor-parallel group.

    The result includes the stack's mask (-inf where a query does not see a key), so blocks need not build their own.
    """

    def __init__(self, model: ResolvedModel, context: ParallelContext, init: StackInit, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.max_distance = model.relative_max_distance
        shape = (model.relative_buckets, model.num_attention_heads)
        self.weight = sharded_parameter(ShardSpec(shape, 1, init.relative_bias), context)

    def forward(self, length: int, lengths: Tensor | None = None) -> Tensor:
        """Entry (i, j) is the bias of the bucket of j - i, so each row is the previous one shifted by one position.

        Everything before the rows is fp32: the backward pass sums up to s entries for each distance.

        Args:
            lengths: [b] keys of an encoder that are not padding; None = all. A causal stack needs no padding mask.
        """
        distances = torch.arange(1 - length, length, device=self.weight.device)  # from query to key
        buckets = relative_buckets(
            distances,
            both_directions=not self.causal,
            num_buckets=self.weight.shape[0],
            max_distance=self.max_distance,
        )
        by_distance = F.embedding(buckets, self.weight.float()).t()  # [n, 2 s - 1]
        if self.causal:
            by_distance = by_distance.masked_fill(distances > 0, -torch.inf)
        rows = by_distance.unfold(1, length, 1).flip(1)  # [n, s, s]; the first window is the last query's row
        bias = rows.unsqueeze(0).to(self.weight.dtype)
        if self.causal or lengths is None:
            return bias
        return torch.where(key_mask(length, lengths), bias, -torch.inf)


def relative_buckets(distances: Tensor, *, both_directions: bool, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket, in [0, num_buckets), of each distance (key position - query position).

    Half of a direction's buckets hold one distance each; the others grow logarithmically up to max_distance.

    Args:
        both_directions: the upper half of the buckets is for keys after the query; False = all of those share bucket 0.
    """
    if both_directions:
        num_buckets //= 2
        offset, distances = num_buckets * (distances > 0), distances.abs()
    else:
        offset, distances = torch.zeros_like(distances), (-distances).clamp(min=0)
    exact = num_buckets // 2
    growth = torch.log(distances.clamp(min=1) / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (growth * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distances < exact, distances, logarithmic)
