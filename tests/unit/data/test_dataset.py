"""Samples by number, against a plain rebuilding of the epoch's stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.dataset import BlendedDataset, CausalLMDataset, samples_in
from megatron_lite.data.indexed import IndexedReader, IndexedWriter
from megatron_lite.data.loader import micro_batches, training_dataset, validation_dataset
from megatron_lite.data.prepare import prepare
from megatron_lite.data.prepared import Part, PreparedData, Shard
from megatron_lite.data.special import SpecialTokens
from megatron_lite.errors import ConfigError, DataError

SEQ = 7


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """40 documents of 0 to 29 tokens; every token of the file is unique, so that a window tells where it lies."""
    lengths = np.random.default_rng(5).integers(0, 30, 40)
    lengths[3] = 0
    writer = IndexedWriter(tmp_path / "x", np.int32)
    writer.add(np.arange(lengths.sum(), dtype=np.int32), lengths)
    facts = writer.finish()
    return Shard(
        source="x",
        source_index=0,
        prefix=tmp_path / "x",
        part=Part.everything,
        validation_fraction=0.0,
        documents=facts.documents,
        tokens=facts.tokens,
        max_token_id=facts.tokens - 1,
        bin_bytes=facts.bin_bytes,
        idx_bytes=facts.idx_bytes,
        bin_xxh3=facts.bin_xxh3,
        idx_xxh3=facts.idx_xxh3,
    )


def chain_windows(windows: list[tuple[int, ...]]) -> list[int]:
    """Join windows that overlap in one token into the stream they were cut from."""
    by_first = {window[0]: window for window in windows}
    assert len(by_first) == len(windows)
    lasts = {window[-1] for window in windows}
    (start,) = [first for first in by_first if first not in lasts]
    stream = [start]
    while stream[-1] in by_first:
        stream += by_first[stream[-1]][1:]
    return stream


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_an_epoch_is_one_stream_of_whole_documents_with_every_window_once(shard: Shard, epoch: int) -> None:
    dataset = CausalLMDataset(shard, SEQ, seed=1)
    count = dataset.samples_per_epoch
    assert count == samples_in(shard.tokens, SEQ) == (shard.tokens - 1) // SEQ
    windows = [tuple(dataset.sample(epoch * count + i).tolist()) for i in range(count)]
    stream = chain_windows(windows)
    assert len(stream) == count * SEQ + 1
    assert max(Counter(stream).values()) == 1
    reader = IndexedReader(shard.prefix)
    documents = {d[0]: d for i in range(reader.num_documents) if (d := reader.document(i).tolist())}
    place = 0
    while place < len(stream):  # each document of the stream is whole, but for the dropped tail
        expected = documents[stream[place]]
        assert stream[place : place + len(expected)] == expected[: len(stream) - place]
        place += len(expected)


def test_epochs_and_seeds_differ_in_documents_and_in_order(shard: Shard) -> None:
    dataset = CausalLMDataset(shard, SEQ, seed=1)
    count = dataset.samples_per_epoch
    epochs = [[tuple(dataset.sample(e * count + i)) for i in range(count)] for e in range(2)]
    other = CausalLMDataset(shard, SEQ, seed=2)
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) != set(epochs[1])  # other documents meet in a window
    assert epochs[0] != [tuple(other.sample(i)) for i in range(count)]


def test_windows_of_one_document_come_in_another_order_each_epoch(tmp_path: Path, shard: Shard) -> None:
    writer = IndexedWriter(tmp_path / "one", np.int32)
    writer.add(np.arange(7 * 50 + 1), np.array([7 * 50 + 1]))
    writer.finish()
    dataset = CausalLMDataset(replace(shard, prefix=tmp_path / "one"), SEQ, seed=1)
    epochs = [[int(dataset.sample(epoch * 50 + i)[0]) for i in range(50)] for epoch in range(3)]
    assert len({tuple(starts) for starts in epochs}) == 3
    assert all(sorted(starts) == list(range(0, 350, 7)) for starts in epochs)


def test_samples_are_a_function_of_the_index_alone(shard: Shard) -> None:
    """A resumed run, which begins in the middle, and one that jumps between epochs see the same."""
    dataset = CausalLMDataset(shard, SEQ, seed=1)
    total = 4 * dataset.samples_per_epoch
    forward = [dataset.sample(i).tolist() for i in range(total)]
    resumed = CausalLMDataset(shard, SEQ, seed=1)
    jumps = np.random.default_rng(0).permutation(total).tolist()
    assert all(resumed.sample(i).tolist() == forward[i] for i in jumps)


def test_sources_with_equal_documents_are_ordered_differently(shard: Shard) -> None:
    first, second = (CausalLMDataset(replace(shard, source_index=i), SEQ, seed=1) for i in (0, 1))
    assert [first.sample(i).tolist() for i in range(9)] != [second.sample(i).tolist() for i in range(9)]


def test_a_window_longer_than_documents_and_one_window_an_epoch(shard: Shard) -> None:
    dataset = CausalLMDataset(shard, shard.tokens - 1, seed=1)
    assert dataset.samples_per_epoch == 1
    assert sorted(dataset.sample(3).tolist()) == list(range(shard.tokens))


def test_blended_samples_come_from_the_sources_in_their_own_order(shard: Shard) -> None:
    datasets = [CausalLMDataset(replace(shard, source_index=i), SEQ, seed=1) for i in (0, 1)]
    blend = BlendedDataset(datasets, (0.75, 0.25), seed=1)
    seen = Counter(tuple(blend.sample(i).tolist()) for i in range(400))
    expected = Counter(tuple(datasets[0].sample(i).tolist()) for i in range(300))
    expected += Counter(tuple(datasets[1].sample(i).tolist()) for i in range(100))
    assert sum((seen - expected).values()) <= 3  # the jitter of the blend moves a few across the end


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 6, 12])
def test_grouping_into_micro_batches_keeps_the_order(shard: Shard, micro_batch_size: int) -> None:
    dataset = CausalLMDataset(shard, SEQ, seed=1)
    batches = micro_batches(dataset, 5, micro_batch_size, 12 // micro_batch_size)
    expected = torch.tensor(np.stack([dataset.sample(5 + i) for i in range(12)]))
    assert all(batch.tokens.shape == (micro_batch_size, SEQ) for batch in batches)
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), expected[:, :-1])
    assert torch.equal(torch.cat([batch.labels for batch in batches]), expected[:, 1:])
    assert torch.equal(torch.cat([batch.loss_weights for batch in batches]), torch.ones(12, SEQ))
    assert batches[0].tokens.dtype == batches[0].labels.dtype == torch.int64
    assert batches[0].loss_weights.dtype == torch.float32
    assert batches[0].tokens.is_contiguous()


def test_data_parallel_ranks_partition_the_batch(shard: Shard) -> None:
    """Two ranks with two micro-batches each see what one rank with four sees."""
    dataset = CausalLMDataset(shard, SEQ, seed=1)
    one = [batch.tokens for batch in micro_batches(dataset, 8, 2, 4)]
    two = [batch.tokens for rank in (0, 1) for batch in micro_batches(dataset, 8 + 4 * rank, 2, 2)]
    assert torch.equal(torch.cat(one), torch.cat(two))


def test_mask_after_eod_is_zero_exactly_where_the_input_is_the_eod(
    prepared_corpus: tuple[PreparedData, RunConfig],
) -> None:
    prepared, config = prepared_corpus
    config.data.mask_loss_after_eod = True
    dataset = training_dataset(prepared, config)
    batches = micro_batches(dataset, 0, 4, 8, mask_loss_after_eod=True)
    tokens, weights = (torch.cat([getattr(b, name) for b in batches]) for name in ("tokens", "loss_weights"))
    assert torch.equal(weights == 0, tokens == prepared.eod_id)
    assert 0 < int((weights == 0).sum()) < weights.numel() / 4


def test_validation_samples_do_not_depend_on_the_seed(prepared_corpus: tuple[PreparedData, RunConfig]) -> None:
    prepared, config = prepared_corpus
    first = validation_dataset(prepared, config)
    config.train.seed += 1
    second = validation_dataset(prepared, config)
    assert [first.sample(i).tolist() for i in range(20)] == [second.sample(i).tolist() for i in range(20)]


def test_training_order_depends_on_the_seed(prepared_corpus: tuple[PreparedData, RunConfig]) -> None:
    prepared, config = prepared_corpus
    first = training_dataset(prepared, config)
    config.train.seed += 1
    second = training_dataset(prepared, config)
    assert [first.sample(i).tolist() for i in range(20)] != [second.sample(i).tolist() for i in range(20)]


def test_corpus_smaller_than_one_sample(prepared_corpus: tuple[PreparedData, RunConfig]) -> None:
    prepared, config = prepared_corpus
    config.data.seq_length = 50_000
    expected = (
        rf"data\.seq_length=50000 needs at least 50,001 training tokens; .*corpus\.txt has {prepared.train_tokens:,}"
    )
    with pytest.raises(DataError, match=expected):
        training_dataset(prepared, config)
    with pytest.raises(DataError, match=r"validation tokens; .* raise data\.validation_fraction"):
        validation_dataset(prepared, config)


def test_largest_sample_that_fits(prepared_corpus: tuple[PreparedData, RunConfig]) -> None:
    prepared, config = prepared_corpus
    config.data.seq_length = prepared.train_tokens - 1
    assert len(training_dataset(prepared, config).sample(0)) == prepared.train_tokens
    config.data.seq_length += 1
    with pytest.raises(DataError, match="needs at least"):
        training_dataset(prepared, config)


def test_mask_without_a_known_eod(prepared_corpus: tuple[PreparedData, RunConfig]) -> None:
    prepared, config = prepared_corpus
    config.data.mask_loss_after_eod = True
    with pytest.raises(ConfigError, match=r"data\.mask_loss_after_eod=true needs the end-of-document token"):
        training_dataset(replace(prepared, special=SpecialTokens()), config)


def test_two_sources_are_blended_by_weight(
    tmp_path: Path, config_for: Callable[..., RunConfig], silent: Callable[[str], None]
) -> None:
    for name, letter in (("a", "a"), ("b", "b")):
        text = "\n\n".join(f"{letter * 30} {i} {letter * 10}" for i in range(80))
        (tmp_path / f"{name}.txt").write_text(text)
    config = config_for([tmp_path / "a.txt", tmp_path / "b.txt"], weights=[3.0, 1.0])
    prepared = prepare(config, report=silent)
    assert prepared.weights == prepared.validation_weights == (0.75, 0.25)
    dataset = training_dataset(prepared, config)
    tokenizer = prepared.open_tokenizer()
    assert tokenizer is not None
    texts = [tokenizer.decode(dataset.sample(i).tolist()) for i in range(400)]
    assert abs(sum("a" in text for text in texts) - 300) <= 3


def test_a_source_of_weight_zero_is_not_drawn_and_may_be_small(
    tmp_path: Path, corpus: Path, config_for: Callable[..., RunConfig], silent: Callable[[str], None]
) -> None:
    (tmp_path / "small.txt").write_text("\n\n".join(f"s{i}" for i in range(9)))
    config = config_for([corpus, tmp_path / "small.txt"], weights=[1.0, 0.0], seq_length=64)
    alone = config_for(corpus, seq_length=64)
    dataset = training_dataset(prepare(config, report=silent), config)
    assert len(dataset.sample(0)) == 65
    assert prepare(alone, report=silent).weights == (1.0,)
