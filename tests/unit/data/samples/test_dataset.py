"""Samples by number, against a plain rebuilding of the epoch's stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.samples.dataset import BlendedDataset, WindowDataset, windows_in
from megatron_lite.data.samples.loader import training_dataset, validation_dataset
from megatron_lite.data.shards.indexed import IndexedReader, IndexedWriter
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.data.shards.prepared import Part, PreparedData, Shard
from megatron_lite.data.shards.sentences import SentenceWriter
from megatron_lite.errors import DataError
from tests.unit.data.conftest import windows

SEQ = 7


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """40 documents of 0 to 29 tokens; every token of the file is unique, so that a window shows where it is."""
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
    dataset = WindowDataset(shard, SEQ + 1, SEQ, seed=1)
    count = dataset.samples_per_epoch
    assert count == windows_in(shard.tokens, SEQ + 1, SEQ) == (shard.tokens - 1) // SEQ
    windows = [tuple(dataset.sample(epoch * count + i).tokens.tolist()) for i in range(count)]
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


def test_order_is_the_same_in_every_version(shard: Shard) -> None:
    """A run that was begun goes on with the samples it would have had."""
    dataset = WindowDataset(shard, SEQ + 1, SEQ, seed=1)
    assert dataset.sample(123).tokens.tolist() == [320, 321, 322, 323, 324, 181, 508, 215]
    samples = np.stack([dataset.sample(i).tokens for i in range(500)]).astype("<i8")
    assert xxhash.xxh3_64_hexdigest(samples.tobytes()) == "d7c90b38f3795088"


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (5, 9), (1, 1)])
def test_windows_and_strides(shard: Shard, window: int, stride: int) -> None:
    dataset = WindowDataset(shard, window, stride, seed=1)
    whole = WindowDataset(shard, shard.tokens, 1, seed=1)
    stream = whole.sample(0).tokens.tolist()  # of epoch 0
    expected = [stream[i : i + window] for i in range(0, len(stream) - window + 1, stride)]
    assert dataset.samples_per_epoch == len(expected) == windows_in(shard.tokens, window, stride)
    assert sorted(dataset.sample(i).tokens.tolist() for i in range(len(expected))) == sorted(expected)
    assert dataset.sample(0).sentence_starts is None


def test_sentence_starts_of_windows(shard: Shard, tmp_path: Path) -> None:
    starts = IndexedReader(shard.prefix).document_starts
    places = np.unique(np.concatenate([starts, np.arange(0, shard.tokens, 5)]))
    places = places[places < shard.tokens]
    writer = SentenceWriter(tmp_path / "x.sentences", None)
    writer.add_places(places)
    told = replace(shard, **writer.finish())
    dataset = WindowDataset(told, 20, 20, seed=1, sentences=True)
    plain = WindowDataset(shard, 20, 20, seed=1)
    for i in range(3 * dataset.samples_per_epoch):
        tokens, found = dataset.sample(i)
        assert np.array_equal(tokens, plain.sample(i).tokens)
        assert found is not None
        is_start = np.isin(tokens, places)  # each token is its place in the file
        is_start[0] = True
        assert found.tolist() == np.flatnonzero(is_start).tolist()


def test_epochs_and_seeds_differ_in_documents_and_in_order(shard: Shard) -> None:
    dataset = WindowDataset(shard, SEQ + 1, SEQ, seed=1)
    count = dataset.samples_per_epoch
    epochs = [[tuple(dataset.sample(e * count + i).tokens) for i in range(count)] for e in range(2)]
    other = WindowDataset(shard, SEQ + 1, SEQ, seed=2)
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) != set(epochs[1])  # other documents meet in a window
    assert epochs[0] != [tuple(other.sample(i).tokens) for i in range(count)]


def test_windows_of_one_document_come_in_another_order_each_epoch(tmp_path: Path, shard: Shard) -> None:
    writer = IndexedWriter(tmp_path / "one", np.int32)
    writer.add(np.arange(7 * 50 + 1), np.array([7 * 50 + 1]))
    writer.finish()
    dataset = WindowDataset(replace(shard, prefix=tmp_path / "one"), SEQ + 1, SEQ, seed=1)
    epochs = [[int(dataset.sample(epoch * 50 + i).tokens[0]) for i in range(50)] for epoch in range(3)]
    assert len({tuple(starts) for starts in epochs}) == 3
    assert all(sorted(starts) == list(range(0, 350, 7)) for starts in epochs)


def test_samples_are_a_function_of_the_index_alone(shard: Shard) -> None:
    """A resumed run, which begins in the middle, and one that jumps between epochs see the same."""
    dataset = WindowDataset(shard, SEQ + 1, SEQ, seed=1)
    total = 4 * dataset.samples_per_epoch
    forward = [dataset.sample(i).tokens.tolist() for i in range(total)]
    resumed = WindowDataset(shard, SEQ + 1, SEQ, seed=1)
    jumps = np.random.default_rng(0).permutation(total).tolist()
    assert all(resumed.sample(i).tokens.tolist() == forward[i] for i in jumps)


def test_sources_with_equal_documents_are_ordered_differently(shard: Shard) -> None:
    first, second = (WindowDataset(replace(shard, source_index=i), SEQ + 1, SEQ, seed=1) for i in (0, 1))
    assert [first.sample(i).tokens.tolist() for i in range(9)] != [second.sample(i).tokens.tolist() for i in range(9)]


def test_a_window_longer_than_documents_and_one_window_an_epoch(shard: Shard) -> None:
    dataset = WindowDataset(shard, shard.tokens, shard.tokens - 1, seed=1)
    assert dataset.samples_per_epoch == 1
    assert sorted(dataset.sample(3).tokens.tolist()) == list(range(shard.tokens))


def test_blended_samples_come_from_the_sources_in_their_own_order(shard: Shard) -> None:
    datasets = [WindowDataset(replace(shard, source_index=i), SEQ + 1, SEQ, seed=1) for i in (0, 1)]
    blend = BlendedDataset(datasets, (0.75, 0.25), seed=1)
    seen = Counter(tuple(blend.sample(i).tokens.tolist()) for i in range(400))
    expected = Counter(tuple(datasets[0].sample(i).tokens.tolist()) for i in range(300))
    expected += Counter(tuple(datasets[1].sample(i).tokens.tolist()) for i in range(100))
    assert sum((seen - expected).values()) <= 3  # the jitter of the blend moves a few across the end


def test_validation_samples_do_not_depend_on_the_seed(prepared_corpus: tuple[PreparedData, RunConfig]) -> None:
    prepared, config = prepared_corpus
    first = validation_dataset(prepared, config, windows(config))
    config.train.seed += 1
    second = validation_dataset(prepared, config, windows(config))
    assert [first.sample(i).tokens.tolist() for i in range(20)] == [second.sample(i).tokens.tolist() for i in range(20)]


def test_training_order_depends_on_the_seed(prepared_corpus: tuple[PreparedData, RunConfig]) -> None:
    prepared, config = prepared_corpus
    first = training_dataset(prepared, config, windows(config))
    config.train.seed += 1
    second = training_dataset(prepared, config, windows(config))
    assert [first.sample(i).tokens.tolist() for i in range(20)] != [second.sample(i).tokens.tolist() for i in range(20)]


def test_corpus_smaller_than_one_sample(prepared_corpus: tuple[PreparedData, RunConfig]) -> None:
    prepared, config = prepared_corpus
    config.data.seq_length = 50_000
    expected = (
        rf"data\.seq_length=50000 needs at least 50,001 training tokens; .*corpus\.txt has {prepared.train_tokens:,}"
    )
    with pytest.raises(DataError, match=expected):
        training_dataset(prepared, config, windows(config))
    with pytest.raises(DataError, match=r"validation tokens; .* raise data\.validation_fraction"):
        validation_dataset(prepared, config, windows(config))


def test_largest_sample_that_fits(prepared_corpus: tuple[PreparedData, RunConfig]) -> None:
    prepared, config = prepared_corpus
    config.data.seq_length = prepared.train_tokens - 1
    assert len(training_dataset(prepared, config, windows(config)).sample(0).tokens) == prepared.train_tokens
    config.data.seq_length += 1
    with pytest.raises(DataError, match="needs at least"):
        training_dataset(prepared, config, windows(config))


def test_two_sources_are_blended_by_weight(
    tmp_path: Path, config_for: Callable[..., RunConfig], silent: Callable[[str], None]
) -> None:
    for name, letter in (("a", "a"), ("b", "b")):
        text = "\n\n".join(f"{letter * 30} {i} {letter * 10}" for i in range(80))
        (tmp_path / f"{name}.txt").write_text(text)
    config = config_for([tmp_path / "a.txt", tmp_path / "b.txt"], weights=[3.0, 1.0])
    prepared = prepare(config, report=silent)
    assert prepared.weights == prepared.validation_weights == (0.75, 0.25)
    dataset = training_dataset(prepared, config, windows(config))
    tokenizer = prepared.open_tokenizer()
    assert tokenizer is not None
    texts = [tokenizer.decode(dataset.sample(i).tokens.tolist()) for i in range(400)]
    assert abs(sum("a" in text for text in texts) - 300) <= 3


def test_a_source_of_weight_zero_is_not_drawn_and_may_be_small(
    tmp_path: Path, corpus: Path, config_for: Callable[..., RunConfig], silent: Callable[[str], None]
) -> None:
    (tmp_path / "small.txt").write_text("\n\n".join(f"s{i}" for i in range(9)))
    config = config_for([corpus, tmp_path / "small.txt"], weights=[1.0, 0.0], seq_length=64)
    alone = config_for(corpus, seq_length=64)
    dataset = training_dataset(prepare(config, report=silent), config, windows(config))
    assert len(dataset.sample(0).tokens) == 65
    assert prepare(alone, report=silent).weights == (1.0,)
