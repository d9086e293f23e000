"""Pairs of sentences: chunks against a plain loop, samples against what the shard holds, and their statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.config.schema import ObjectiveConfig, RunConfig
from megatron_lite.data.samples import pairs
from megatron_lite.data.samples.dataset import BlendedDataset
from megatron_lite.data.samples.loader import training_dataset, validation_dataset
from megatron_lite.data.samples.pairs import PairDataset, chunks_of, truncated
from megatron_lite.data.samples.sample_types import PairShape, SentencePair
from megatron_lite.data.shards.indexed import IndexedWriter
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.data.shards.prepared import Part, Shard
from megatron_lite.data.shards.sentences import SentenceWriter
from megatron_lite.errors import DataError

ConfigFor = Callable[..., RunConfig]
SHAPE = PairShape(tokens=30, next_fraction=0.5, short_fraction=0.1)
EOD = 10**6
Sentences = list[list[int]]


def write_shard(folder: Path, documents: list[Sentences], part: Part = Part.everything) -> Shard:
    """A shard of documents of sentences, with the end-of-document token behind each document."""
    writer = IndexedWriter(folder / "x", np.int32)
    places, at = SentenceWriter(folder / "x.sentences", None), 0
    for sentences in documents:
        tokens = [*(token for sentence in sentences for token in sentence), EOD]
        writer.add(np.array(tokens), np.array([len(tokens)]))
        starts = at + np.cumsum([0, *map(len, sentences)])[:-1]
        places.add_places(starts)
        at += len(tokens)
    facts = writer.finish()
    return Shard(
        source="x.txt",
        source_index=0,
        prefix=folder / "x",
        part=part,
        validation_fraction=0.3,
        documents=facts.documents,
        tokens=facts.tokens,
        max_token_id=EOD,
        bin_bytes=facts.bin_bytes,
        idx_bytes=facts.idx_bytes,
        bin_xxh3=facts.bin_xxh3,
        idx_xxh3=facts.idx_xxh3,
        **places.finish(),
    )


def random_documents(count: int, most_sentences: int = 12) -> list[Sentences]:
    """Every token of the corpus is unique, so that a part shows where it was cut from."""
    random, at = np.random.default_rng(3), 0
    documents = []
    for _ in range(count):
        sentences = []
        for length in random.integers(1, 15, random.integers(1, most_sentences + 1)):
            sentences.append(list(range(at, at + int(length))))
            at += int(length)
        documents.append(sentences)
    return documents


@pytest.fixture
def documents() -> list[Sentences]:
    return random_documents(60)


@pytest.fixture
def shard(tmp_path: Path, documents: list[Sentences]) -> Shard:
    return write_shard(tmp_path, documents)


def chunks_by_loop(sizes: list[list[int]], tokens: int) -> list[tuple[int, int]]:
    """Greedy: sentences join a chunk until it has two and enough tokens; a single one that is left joins the last."""
    found: list[tuple[int, int]] = []
    number = 0
    for document in sizes:
        end, mine = number + len(document), []
        first, total = number, 0
        for i, size in enumerate(document, number):
            total += size
            if (total >= tokens and i + 1 - first >= 2) or i + 1 == end:
                mine.append((first, i + 1))
                first, total = i + 1, 0
        if len(mine) > 1 and mine[-1][1] - mine[-1][0] == 1:
            mine[-2:] = [(mine[-2][0], end)]
        if len(document) >= 2:
            found += mine
        number = end
    return found


@pytest.mark.parametrize(("block", "few"), [(1, 0), (50, 3), (10**6, 0), (10**6, 64)])
@pytest.mark.parametrize("tokens", [2, 30, 90, 10**6])
def test_chunks_against_a_loop(monkeypatch: pytest.MonkeyPatch, tokens: int, block: int, few: int) -> None:
    monkeypatch.setattr(pairs, "BLOCK_SENTENCES", block)
    monkeypatch.setattr(pairs, "FEW_DOCUMENTS", few)
    sizes = [[len(s) for s in d] for d in [*random_documents(80), *random_documents(1, 3000)]]
    counts = np.array([len(d) for d in sizes])
    first = np.cumsum(counts) - counts
    starts = np.cumsum([0, *(size for d in sizes for size in d)])[:-1]
    usable = counts >= 2
    found = chunks_of(starts, first[usable], (first + counts)[usable], tokens)
    assert list(zip(*(places.tolist() for places in found), strict=True)) == chunks_by_loop(sizes, tokens)


def test_no_documents_no_chunks() -> None:
    empty = np.empty(0, np.int64)
    assert [len(places) for places in chunks_of(np.arange(5), empty, empty, 10)] == [0, 0]


def place_of(documents: list[Sentences]) -> dict[int, tuple[int, int, int]]:
    """Document, sentence and place in the sentence of each token."""
    return {
        token: (d, s, i)
        for d, sentences in enumerate(documents)
        for s, sentence in enumerate(sentences)
        for i, token in enumerate(sentence)
    }


def test_pairs_are_what_they_say(shard: Shard, documents: list[Sentences]) -> None:
    dataset = PairDataset(shard, replace(SHAPE, tokens=60, short_fraction=0.0), seed=1, eod_id=EOD)
    place = place_of(documents)
    untouched = 0
    for i in range(4 * dataset.samples_per_epoch):
        first, second, is_next = dataset.sample(i)
        assert len(first) >= 1
        assert len(second) >= 1
        assert len(first) + len(second) <= 60
        assert EOD not in first
        assert EOD not in second
        for part in (first, second):  # a run of one document
            assert part.tolist() == list(range(part[0], part[-1] + 1))
            assert place[part[0]][0] == place[part[-1]][0]
        (d, s, end), (e, t, begin) = place[first[-1]], place[second[0]]
        assert (d == e) == is_next
        if len(first) + len(second) < 60:  # nothing was cut off
            untouched += 1
            assert end + 1 == len(documents[d][s])
            assert begin == 0
            assert not is_next or t == s + 1
        assert is_next or len(documents[e]) >= 2
    assert untouched > dataset.samples_per_epoch


def test_each_epoch_has_every_chunk_once(shard: Shard, documents: list[Sentences]) -> None:
    everything = PairShape(tokens=10**6, next_fraction=1.0, short_fraction=0.0)
    dataset = PairDataset(shard, everything, seed=1, eod_id=EOD)
    whole = {tuple(t for s in d for t in s) for d in documents if len(d) >= 2}
    assert dataset.samples_per_epoch == len(whole)
    orders = []
    for epoch in range(3):
        samples = [dataset.sample(epoch * len(whole) + i) for i in range(len(whole))]
        assert {(*first.tolist(), *second.tolist()) for first, second, _ in samples} == whole
        orders.append([int(first[0]) for first, _, _ in samples])
    assert len(set(map(tuple, orders))) == 3
    assert dataset.skipped_documents == sum(len(d) < 2 for d in documents) > 0


def test_samples_are_a_function_of_seed_and_index_alone(shard: Shard) -> None:
    def shown(pair: SentencePair) -> tuple[list[int], list[int], bool]:
        return pair.first.tolist(), pair.second.tolist(), pair.is_next

    dataset, resumed = (PairDataset(shard, SHAPE, seed=1, eod_id=EOD) for _ in range(2))
    total = 3 * dataset.samples_per_epoch
    forward = [shown(dataset.sample(i)) for i in range(total)]
    jumps = np.random.default_rng(0).permutation(total).tolist()
    assert all(shown(resumed.sample(i)) == forward[i] for i in jumps)
    for other in (PairDataset(shard, SHAPE, 2, EOD), PairDataset(replace(shard, source_index=1), SHAPE, 1, EOD)):
        assert [shown(other.sample(i)) for i in range(20)] != forward[:20]


@pytest.mark.parametrize(("next_fraction", "short_fraction"), [(0.5, 0.1), (0.0, 0.0), (0.2, 1.0), (1.0, 0.5)])
def test_statistics(tmp_path: Path, next_fraction: float, short_fraction: float) -> None:
    documents = random_documents(400, 30)
    dataset = PairDataset(write_shard(tmp_path, documents), PairShape(64, next_fraction, short_fraction), 5, EOD)
    count = 20_000
    samples = [dataset.sample(i) for i in range(count)]
    spread = 4 * np.sqrt(0.25 / count)
    assert abs(np.mean([pair.is_next for pair in samples]) - next_fraction) < spread
    lengths = np.array([len(pair.first) + len(pair.second) for pair in samples])
    assert lengths.max() == (63 if short_fraction == 1.0 else 64)
    if short_fraction == 1.0:  # the target is uniform in [2, 63]; a document may be shorter still
        assert 25 < lengths.mean() < 33
        assert set(range(2, 60)) <= set(lengths.tolist())
    if short_fraction == 0.0:
        assert (lengths == 64).mean() > 0.6  # the others: ends of documents


def test_half_of_the_pairs_are_neighbours(tmp_path: Path) -> None:
    """Of BERT's objective with its defaults, by what the parts hold: in documents of many sentences, short pairs."""
    documents = [[[1000 * d + 2 * s, 1000 * d + 2 * s + 1] for s in range(40)] for d in range(30)]
    objective = ObjectiveConfig()
    shape = PairShape(9, objective.next_fraction, objective.short_fraction)
    dataset = PairDataset(write_shard(tmp_path, documents), shape, 3, EOD)
    samples = [dataset.sample(i) for i in range(100_000)]
    same = [int(pair.first[0]) // 1000 == int(pair.second[0]) // 1000 for pair in samples]
    assert same == [pair.is_next for pair in samples]
    assert abs(sum(same) / len(same) - 0.5) < 5 * np.sqrt(0.25 / len(same))


def test_random_sentences_come_from_all_other_documents_alike(tmp_path: Path) -> None:
    documents = [[[d * 100 + s] for s in range(4)] for d in range(5)]
    dataset = PairDataset(write_shard(tmp_path, documents), PairShape(3, 0.0, 0.0), 1, EOD)
    pairs_seen, begins = Counter(), Counter()
    for i in range(8000):
        first, second, is_next = dataset.sample(i)
        assert not is_next
        pairs_seen[int(first[0]) // 100, int(second[0]) // 100] += 1
        begins[int(second[0]) % 100] += 1
    assert set(pairs_seen) == {(a, b) for a in range(5) for b in range(5) if a != b}
    assert min(pairs_seen.values()) > 320  # of 400 each
    assert min(begins.values()) > 1800  # of 2000 each


def test_truncation_takes_the_lengths_that_bert_takes() -> None:
    for a in range(1, 12):
        for b in range(1, 12):
            for most in range(2, 20):
                left = [a, b]
                while sum(left) > most:
                    left[0 if left[0] > left[1] else 1] -= 1
                (c, d), (e, f) = truncated((10, 10 + a), (50, 50 + b), most, key=a * b * most)
                assert [d - c, f - e] == left
                assert 10 <= c < d <= 10 + a
                assert 50 <= e < f <= 50 + b


def test_truncation_takes_from_front_and_back_alike() -> None:
    fronts = [truncated((0, 1000), (0, 1), 901, key)[0][0] for key in range(4000)]
    assert abs(np.mean(fronts) - 50) < 0.4
    assert abs(np.var(fronts) - 25) < 2.5  # binomial


def test_a_part_of_a_ready_shard_uses_its_documents_only(shard: Shard, documents: list[Sentences]) -> None:
    place = place_of(documents)
    seen = []
    for part in (Part.train, Part.validation):
        dataset = PairDataset(replace(shard, part=part), SHAPE, 1, EOD)
        samples = [dataset.sample(i) for i in range(3 * dataset.samples_per_epoch)]
        seen.append({place[token][0] for first, second, _ in samples for token in (*first.tolist(), *second.tolist())})
    assert not seen[0] & seen[1]
    assert sorted(seen[0] | seen[1]) == [d for d, sentences in enumerate(documents) if len(sentences) > 1]


def test_blended_pairs(shard: Shard) -> None:
    datasets = [PairDataset(replace(shard, source_index=i), SHAPE, 1, EOD) for i in (0, 1)]
    blend = BlendedDataset(datasets, (0.75, 0.25), seed=1)
    seen = Counter((tuple(p.first), tuple(p.second)) for p in map(blend.sample, range(400)))
    expected = Counter((tuple(p.first), tuple(p.second)) for p in map(datasets[0].sample, range(300)))
    expected += Counter((tuple(p.first), tuple(p.second)) for p in map(datasets[1].sample, range(100)))
    assert sum((seen - expected).values()) <= 3


def write_text(path: Path, documents: int, sentences: int) -> Path:
    texts = [" ".join(f"Sentence {s} of {d}." for s in range(sentences)) for d in range(documents)]
    path.write_text("\n\n".join(texts))
    return path


def test_pairs_of_text(tmp_path: Path, config_for: ConfigFor) -> None:
    config = config_for(write_text(tmp_path / "t.txt", 80, 6), validation_fraction=0.2)
    prepared = prepare(config, report=lambda line: None)
    tokenizer = prepared.open_tokenizer()
    assert tokenizer is not None
    shape = PairShape(10**4, 0.5, 0.0)
    for dataset in (training_dataset(prepared, config, shape), validation_dataset(prepared, config, shape)):
        for i in range(30):
            first, second, is_next = dataset.sample(i)
            assert isinstance(is_next, bool)
            a, b = tokenizer.decode(first), tokenizer.decode(second)
            assert a.startswith("Sentence 0")
            assert a.endswith(".")
            assert b.lstrip().startswith("Sentence")
            assert b.endswith(".")  # no end-of-document token
            assert (a.split(" ")[3] == b.split()[3]) == is_next


def test_no_document_of_two_sentences(tmp_path: Path, config_for: ConfigFor) -> None:
    path = write_text(tmp_path / "t.txt", 80, 1)
    config = config_for(path, validation_fraction=0.2)
    prepared = prepare(config, report=lambda line: None)
    for function, which, remedy in (
        (training_dataset, "training", "add text"),
        (validation_dataset, "validation", "raise data.validation_fraction"),
    ):
        with pytest.raises(DataError) as error:
            function(prepared, config, SHAPE)
        skipped = prepared.train_documents if which == "training" else prepared.validation_documents
        assert str(error.value) == (
            f"{path} has 0 {which} documents of two or more sentences; pairs of sentences need 2 of them ({skipped} "
            f"shorter ones were skipped); check how data.source is split into documents, or {remedy}"
        )


def test_one_document_gives_no_pairs_of_two(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, [[[1, 2], [3, 4], [5]], [[6]]])
    assert PairDataset(shard, SHAPE, 1, EOD).samples_per_epoch == 0
    alone = PairDataset(shard, replace(SHAPE, next_fraction=1.0), 1, EOD)
    assert alone.samples_per_epoch == 1
    assert alone.sample(0).is_next


def test_shards_without_sentences(tmp_path: Path, config_for: ConfigFor) -> None:
    writer = IndexedWriter(tmp_path / "x", np.uint16)
    writer.add(np.arange(600) % 9, np.full(20, 30))
    writer.finish()
    config = config_for(tmp_path / "x", vocab_size=9)
    prepared = prepare(config, report=lambda line: None)
    with pytest.raises(DataError) as error:
        training_dataset(prepared, config, SHAPE)
    assert str(error.value) == (
        f"{tmp_path / 'x'} has no sentence boundaries, which this objective needs: these shards came without a "
        "tokenizer; name its folder in data.tokenizer"
    )
