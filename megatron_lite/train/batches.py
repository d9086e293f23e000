"""The global token denominator: one batch is one sum over tokens, whatever ranks and micro-batches it is cut into."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_lite.data.loader import MicroBatch
from megatron_lite.parallel.context import ParallelContext


def normalise(batches: Sequence[MicroBatch], context: ParallelContext) -> list[MicroBatch]:
    """Scale the loss weights so that DeepSpeed's mean of means becomes the mean over all tokens.

    DeepSpeed averages over this rank's micro-batches and then over data-parallel ranks. With every weight multiplied by
    (micro-batches x ranks / total weight), that average equals Σ weight x loss / Σ weight of the whole global batch
    (transformers PR 34191 tells what happens otherwise). One scalar all-reduce over the data-parallel group.
    """
    total = torch.stack([batch.loss_weights.sum() for batch in batches]).sum().to(context.device)
    if context.data_group is not None:
        dist.all_reduce(total, group=context.data_group)
    # A batch without any counted token has loss 0 and no gradient, rather than a division by zero.
    scale = (len(batches) * context.data_size / total.clamp(min=1e-20)).cpu()
    return [batch._replace(loss_weights=batch.loss_weights * scale) for batch in batches]
