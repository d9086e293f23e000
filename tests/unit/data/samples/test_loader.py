"""Batches: samples by global index, through an objective, into tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.sampler import stream_key
from megatron_lite.data.samples.batch import MicroBatch, micro_batches
from megatron_lite.data.samples.loader import training_dataset
from megatron_lite.data.samples.sample_types import Example, Text
from megatron_lite.data.shards.prepared import PreparedData
from tests.unit.data.conftest import windows


class Length(NamedTuple):
    length: int | None


class Numbers:
    """Sample i is the window [i, i + 8)."""

    def sample(self, index: int) -> Text:
        return Text(np.arange(index, index + 8))


class Fake:
    """Two inputs, one without length; the key goes into the weights."""

    inputs = (Length(7), Length(None))
    label_length = 3

    def __init__(self, has_sequence_label: bool = False) -> None:
        self.has_sequence_label = has_sequence_label

    def example(self, text: Any, key: int) -> Example:
        tokens = text.tokens
        weights = np.full(3, key % 1000, np.float32)
        label = int(tokens[0]) % 2 if self.has_sequence_label else None
        return Example((tokens[:-1], int(tokens[-1])), tokens[1:4], weights, label)


def joined(batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
    found = {name: torch.cat([getattr(b, name) for b in batches]) for name in ("labels", "loss_weights")}
    return found | {f"input_{k}": torch.cat([b.inputs[k] for b in batches]) for k in range(len(batches[0].inputs))}


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 6, 12])
def test_grouping_into_micro_batches_keeps_the_order(micro_batch_size: int) -> None:
    batches = micro_batches(Numbers(), Fake(), range(5, 17), micro_batch_size, seed=9)
    assert len(batches) == 12 // micro_batch_size
    assert all(batch.inputs[0].shape == (micro_batch_size, 7) for batch in batches)
    assert all(batch.inputs[1].shape == (micro_batch_size,) for batch in batches)
    found = joined(batches)
    index = torch.arange(5, 17)
    assert torch.equal(found["input_0"], index[:, None] + torch.arange(7))
    assert torch.equal(found["input_1"], index + 7)
    assert torch.equal(found["labels"], index[:, None] + torch.arange(1, 4))
    keys = torch.tensor([stream_key(9, int(i)) % 1000 for i in index], dtype=torch.float32)
    assert torch.equal(found["loss_weights"], keys[:, None].expand(12, 3))
    assert batches[0].inputs[0].dtype == batches[0].labels.dtype == torch.int64
    assert batches[0].loss_weights.dtype == torch.float32
    assert all(tensor.is_contiguous() for batch in batches for tensor in (*batch.inputs, batch.labels))
    assert batches[0].sequence_labels is batches[0].sequence_weights is None


def test_data_parallel_ranks_partition_the_batch() -> None:
    """Two ranks with two micro-batches each see what one rank with four sees."""
    one = joined(micro_batches(Numbers(), Fake(), range(8, 16), 2, seed=1))
    parts = (range(8, 12), range(12, 16))
    two = joined([b for part in parts for b in micro_batches(Numbers(), Fake(), part, 2, seed=1)])
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_sequence_labels() -> None:
    batches = micro_batches(Numbers(), Fake(has_sequence_label=True), range(4, 10), 3, seed=1)
    assert [b.sequence_labels.tolist() for b in batches] == [[0, 1, 0], [1, 0, 1]]
    assert [b.sequence_weights.tolist() for b in batches] == [[1.0] * 3] * 2
    assert batches[0].sequence_labels.dtype == torch.int64
    assert batches[0].sequence_weights.dtype == torch.float32


class Causal:
    inputs = (Length(16),)
    label_length = 16
    has_sequence_label = False

    def example(self, text: Any, key: int) -> Example:
        return Example((text.tokens[:-1],), text.tokens[1:], np.ones(16, np.float32))


def test_batches_of_prepared_data(prepared_corpus: tuple[PreparedData, RunConfig]) -> None:
    prepared, config = prepared_corpus
    dataset = training_dataset(prepared, config, windows(config))
    found = joined(micro_batches(dataset, Causal(), range(3, 11), 4, seed=config.train.seed))
    expected = torch.tensor(np.stack([dataset.sample(i).tokens for i in range(3, 11)]))
    assert torch.equal(found["input_0"], expected[:, :-1])
    assert torch.equal(found["labels"], expected[:, 1:])
