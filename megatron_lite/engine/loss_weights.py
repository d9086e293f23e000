"""The global token denominator: the loss is the mean over all tokens of a global batch, independent of how it is split
into ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_lite.data.samples.batch import MicroBatch
from megatron_lite.parallel.context import ParallelContext


def scale_loss_weights(batches: Sequence[MicroBatch], context: ParallelContext) -> list[MicroBatch]:
    """Scale the loss weights so that DeepSpeed's mean of means becomes the mean over all tokens.

    DeepSpeed averages over this rank's micro-batches and then over data-parallel ranks. With every weight multiplied by
    (micro-batches x ranks / total weight), that average equals Σ weight x loss / Σ weight of the whole global batch
    (transformers PR 34191 describes what goes wrong otherwise). Sequence labels have weights of their own. Costs one
    all-reduce of at most two numbers over the data-parallel group; the host does not wait for the device.

    Args:
        batches: on the context's device.
    """
    weights = [[w for w in (b.loss_weights, b.sequence_weights) if w is not None] for b in batches]
    sums = [torch.stack([w.sum() for w in kinds]).sum() for kinds in zip(*weights, strict=True)]
    totals = torch.stack(sums)  # [1 or 2]
    if context.data_group is not None:
        dist.all_reduce(totals, group=context.data_group)
    # A batch without any counted token then has loss 0 and gradient 0 instead of NaN.
    scales = len(batches) * context.data_size / totals.clamp(min=1e-20)
    return [_scaled(batch, scales) for batch in batches]


def _scaled(batch: MicroBatch, scales: torch.Tensor) -> MicroBatch:
    batch = batch._replace(loss_weights=batch.loss_weights * scales[0])
    if batch.sequence_weights is None:
        return batch
    return batch._replace(sequence_weights=batch.sequence_weights * scales[1])


def targets_of(batch: MicroBatch) -> tuple[torch.Tensor, ...]:
    """The labels and weights that the loss needs besides the model's output."""
    targets = (batch.labels, batch.loss_weights, batch.sequence_labels, batch.sequence_weights)
    return tuple(tensor for tensor in targets if tensor is not None)
