"""Which samples each rank reads, with and without some that are left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_lite.config.schema import ObjectiveName, RunConfig
from megatron_lite.data.samples.batch import MicroBatch, micro_batches
from megatron_lite.data.samples.loader import VALIDATION_SEED, training_dataset, validation_dataset
from megatron_lite.data.samples.skips import Skips, Window
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.data.shards.prepared import PreparedData
from megatron_lite.objectives.build import build_objective
from megatron_lite.optim.batch_ramp import BatchStep
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.topology import Topology
from megatron_lite.train.evaluation import HeldOut
from megatron_lite.train.shard_source import ShardSource
from tests.unit.data.conftest import document

WINDOWS = (Window(6, 9), Window(17, 30), Window(40, 41))
LEFT = [index for index in range(200) if not any(w.first <= index < w.stop for w in WINDOWS)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedData, RunConfig]:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_text("\n\n".join(document(i) for i in range(120)))
    config = RunConfig()
    config.data.source, config.data.cache_dir = str(folder / "text.txt"), str(folder / "cache")
    config.data.tokenizer_vocab_size, config.data.seq_length, config.data.validation_fraction = 510, 16, 0.1
    config.objective.name = ObjectiveName.masked_lm  # each sample has masks of its own number
    config.train.micro_batch_size = 2
    return prepare(config, report=lambda line: None), config


def source_of(corpus: tuple[PreparedData, RunConfig], data_size: int, rank: int, skips: Skips) -> ShardSource:
    prepared, config = corpus
    objective = build_objective(config.objective, config.data, prepared.vocabulary)
    context = replace(ParallelContext.single(), topology=Topology(data_parallel_size=data_size), rank=rank)
    return ShardSource(prepared, config, objective, context, skips)


def rows(batches: list[MicroBatch]) -> tuple[torch.Tensor, ...]:
    fields = ("labels", "loss_weights")
    return (torch.cat([b.inputs[0] for b in batches]), *(torch.cat([getattr(b, f) for b in batches]) for f in fields))


def expected(
    corpus: tuple[PreparedData, RunConfig], indices: list[int], *, held_out: bool = False
) -> tuple[torch.Tensor, ...]:
    """These samples, one by one."""
    prepared, config = corpus
    objective = build_objective(config.objective, config.data, prepared.vocabulary)
    dataset = (validation_dataset if held_out else training_dataset)(prepared, config, objective.shape)
    return rows(micro_batches(dataset, objective, indices, 1, VALIDATION_SEED if held_out else config.train.seed))


def equal(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("data_size", [1, 2, 4])
@pytest.mark.parametrize(("skips", "stream"), [(Skips(), list(range(200))), (Skips(WINDOWS), LEFT)])
def test_ranks_together_read_the_stream_without_what_is_left_out(
    corpus: tuple[PreparedData, RunConfig], data_size: int, skips: Skips, stream: list[int]
) -> None:
    sources = [source_of(corpus, data_size, rank, skips) for rank in range(data_size)]
    for first in range(0, 64, 8):
        batch = BatchStep(first, 8)
        found = rows([one for source in sources for one in source.training(batch)])
        assert equal(found, expected(corpus, stream[first : first + 8]))


def test_a_rollback_replaces_what_is_left_out(corpus: tuple[PreparedData, RunConfig]) -> None:
    source = source_of(corpus, 1, 0, Skips())
    batch = BatchStep(4, 4)
    assert equal(rows(source.training(batch)), expected(corpus, [4, 5, 6, 7]))
    source.leave_out(Skips([Window(5, 7)]))
    assert equal(rows(source.training(batch)), expected(corpus, [4, 7, 8, 9]))


PARTS = {
    (1, 0): [0, 1, 2, 3, 4, 5, 6, 7],
    (2, 0): [0, 1, 2, 3],
    (2, 1): [4, 5, 6, 7],
    (4, 0): [0, 1],
    (4, 1): [2, 3],
    (4, 2): [4, 5],
    (4, 3): [6, 7],
}
"""Samples by (data-parallel size, rank), of 8."""


def reads_its_part(corpus: tuple[PreparedData, RunConfig], data_size: int, rank: int) -> bool:
    """Whether a rank's held-out samples are those of PARTS, and so many micro-batches as it is said to have."""
    prepared, config = corpus
    train = replace(config.train, global_batch_size=4, eval_batches=2)
    source = source_of((prepared, replace(config, train=train)), data_size, rank, Skips())
    ((batches, count),) = source.held_out.rounds()
    assert len(batches) == count
    return equal(rows(batches), expected(corpus, PARTS[data_size, rank], held_out=True))


@pytest.mark.parametrize(("data_size", "rank"), PARTS)
def test_each_rank_validates_on_its_part_of_the_held_out_samples(
    corpus: tuple[PreparedData, RunConfig], data_size: int, rank: int
) -> None:
    assert reads_its_part(corpus, data_size, rank)


@pytest.mark.parametrize("off_by", [-1, 1])
def test_a_slice_that_is_off_by_one_is_caught(
    corpus: tuple[PreparedData, RunConfig], off_by: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = HeldOut._own_part

    def shifted(held_out: HeldOut) -> range:
        own = right(held_out)
        return range(own.start + off_by, own.stop + off_by)

    monkeypatch.setattr(HeldOut, "_own_part", shifted)
    assert not reads_its_part(corpus, 2, 1)


def test_validation_leaves_nothing_out(corpus: tuple[PreparedData, RunConfig]) -> None:
    plain, skipping = (source_of(corpus, 2, 1, skips) for skips in (Skips(), Skips([Window(0, 50)])))
    ((batches, _),), ((others, _),) = plain.held_out.rounds(), skipping.held_out.rounds()
    assert equal(rows(batches), rows(others))


def test_passes_hold_fewer_samples_where_some_are_left_out(corpus: tuple[PreparedData, RunConfig]) -> None:
    whole = source_of(corpus, 1, 0, Skips()).samples_in(1)
    assert source_of(corpus, 1, 0, Skips(WINDOWS)).samples_in(1) == whole - 17
    beyond = Skips([Window(whole - 3, whole + 9)])
    assert source_of(corpus, 1, 0, beyond).samples_in(1) == whole - 3


def test_stages_between_first_and_last_read_nothing(corpus: tuple[PreparedData, RunConfig]) -> None:
    prepared, config = corpus
    objective = build_objective(config.objective, config.data, prepared.vocabulary)
    context = replace(ParallelContext.single(), topology=Topology(pipeline_parallel_size=3), rank=1)
    source = ShardSource(prepared, config, objective, context, Skips(WINDOWS))
    assert source.training(BatchStep(0, 8)) == []
    assert all(batches == [] for batches, _ in source.held_out.rounds())
