"""Which held-out samples an evaluation counts, and how its parts become one."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from megatron_lite.data.samples.dataset import ChainedDataset
from megatron_lite.data.samples.sample_types import Example, Text
from megatron_lite.engine.engine import Evaluation
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.topology import Topology
from megatron_lite.train import evaluation
from megatron_lite.train.evaluation import HeldOut, joined


class Numbers(NamedTuple):
    """A dataset whose sample i is the number i."""

    first: int = 0

    def sample(self, index: int) -> Text:
        return Text(np.array([self.first + index]))


class Copy:
    """An objective: the label is the number."""

    def example(self, text: Text, key: int) -> Example:
        return Example((text.tokens,), text.tokens, np.ones(1, np.float32), sequence_label=0)


def held_out(num_samples: int, data_size: int, rank: int, topology: Topology | None = None) -> HeldOut:
    topology = topology or Topology(data_parallel_size=data_size)
    context = replace(ParallelContext.single(), topology=topology, rank=rank)
    return HeldOut(Numbers(), num_samples, Copy(), context, micro_batch_size=2)  # type: ignore[arg-type]


def counted(loader: HeldOut) -> list[int]:
    """The samples with weight, in their order; those of a class have the same weights."""
    found = []
    for batches, count in loader.rounds():
        assert len(batches) == count
        for batch in batches:
            assert torch.equal(batch.loss_weights[:, 0], batch.sequence_weights)
            found += batch.labels[batch.loss_weights > 0].tolist()
    return found


@pytest.mark.parametrize("round_micro_batches", [1, 2, 256])
@pytest.mark.parametrize("data_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_samples", [1, 2, 7, 8, 13])
def test_each_sample_counts_once_and_ranks_have_as_many_micro_batches(
    num_samples: int, data_size: int, round_micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "ROUND_MICRO_BATCHES", round_micro_batches)
    loaders = [held_out(num_samples, data_size, rank) for rank in range(data_size)]
    assert [sample for loader in loaders for sample in counted(loader)] == list(range(num_samples))
    sizes = [[count for _, count in loader.rounds()] for loader in loaders]
    assert all(size == sizes[0] for size in sizes)
    assert max(sizes[0]) <= round_micro_batches


def test_stages_that_do_not_read_have_the_same_rounds() -> None:
    reading = held_out(13, 1, 0)
    silent = HeldOut(None, 13, Copy(), ParallelContext.single(), 2)  # type: ignore[arg-type]
    assert [([], count) for _, count in reading.rounds()] == list(silent.rounds())


def test_chained_datasets_give_each_sample_of_a_pass_once() -> None:
    chain = ChainedDataset([Numbers(0), Numbers(100), Numbers(200)], [3, 1, 2])  # type: ignore[list-item]
    found = [int(chain.sample(index).tokens[0]) for index in range(12)]
    assert found == 2 * [0, 1, 2, 100, 200, 201]
    assert chain.samples_in(2) == 12


def test_parts_count_by_their_tokens_and_samples() -> None:
    one = Evaluation(3.5, 3.0, 0.5, 1.0, tokens=30.0, sequences=2.0)
    other = Evaluation(1.2, 1.0, 0.1, 0.0, tokens=10.0, sequences=6.0)
    both = joined([one, other])
    assert both.token_loss == pytest.approx(2.5)
    assert both.loss == pytest.approx(2.5 + (0.5 * 2 + 0.2 * 6) / 8)
    assert both.accuracy == pytest.approx(0.4)
    assert both.sequence_accuracy == pytest.approx(0.25)
    assert (both.tokens, both.sequences) == (40.0, 8.0)
    assert joined([one]) is one
    plain = Evaluation(3.0, 3.0, 0.5, tokens=30.0)
    assert joined([plain, plain]) == replace(plain, tokens=60.0)
