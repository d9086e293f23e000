"""From global sample numbers to the tensors of a forward pass.

Shapes: b micro-batch, d positions whose labels are predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_lite.data.samples.dataset import SampleDataset
from megatron_lite.data.samples.loader import ExampleMaker, examples
from megatron_lite.data.samples.sample_types import Example


class MicroBatch(NamedTuple):
    """The inputs of the model, and the targets of the loss."""

    inputs: tuple[Tensor, ...]
    """In the order of the objective's `inputs`: [b, length] int64, or [b] for a field without a length."""
    labels: Tensor
    """[b, d] int64."""
    loss_weights: Tensor
    """[b, d] fp32: 0 where the prediction does not count."""
    sequence_labels: Tensor | None = None
    """[b] int64: the class of each sample; None if samples have no class."""
    sequence_weights: Tensor | None = None
    """[b] fp32: all ones."""


def stack(examples: Sequence[Example]) -> MicroBatch:
    """Stack samples of one objective into a micro-batch."""
    columns = zip(*(example.inputs for example in examples), strict=True)
    inputs = tuple(torch.from_numpy(np.stack(column)) for column in columns)
    labels = torch.from_numpy(np.stack([example.labels for example in examples]))
    weights = torch.from_numpy(np.stack([example.loss_weights for example in examples]))
    classes = [example.sequence_label for example in examples]
    if classes[0] is None:
        return MicroBatch(inputs, labels, weights)
    return MicroBatch(inputs, labels, weights, torch.tensor(classes), torch.ones(len(classes)))


def micro_batches(
    dataset: SampleDataset[Any], objective: ExampleMaker, indices: Sequence[int], micro_batch_size: int, seed: int
) -> list[MicroBatch]:
    """These samples, in this order, as micro-batches.

    Args:
        indices: global numbers of this rank's samples of the step; their count is a multiple of micro_batch_size.
        seed: together with the global number, the key of a sample's random choices.
    """
    rows = list(examples(dataset, objective, indices, seed))
    return [stack(rows[first : first + micro_batch_size]) for first in range(0, len(rows), micro_batch_size)]
