"""Ready Megatron shards, with and without a sidecar, used where they lie."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.samples.loader import training_dataset, validation_dataset
from megatron_lite.data.shards import ready
from megatron_lite.data.shards.indexed import OTHERS, IndexedReader, IndexedWriter
from megatron_lite.data.shards.prepare import planned_vocab_size, prepare
from megatron_lite.data.shards.prepared import Part, PreparedData, documents_of_part
from megatron_lite.errors import ConfigError, DataError
from tests.unit.data.conftest import windows
from tests.unit.remedies import obeys

ConfigFor = Callable[..., RunConfig]
Silent = Callable[[str], None]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A pair without a sidecar: 200 documents of ids below 90."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 40, 200)
    writer = IndexedWriter(tmp_path / "foreign", np.uint16)
    writer.add(random.integers(0, 90, lengths.sum()).astype(np.int32), lengths)
    writer.finish()
    return tmp_path / "foreign"


def test_foreign_shards_with_a_given_vocabulary(foreign: Path, config_for: ConfigFor, silent: Silent) -> None:
    config = config_for(foreign, vocab_size=90)
    prepared = prepare(config, report=silent)
    assert prepared.tokenizer_dir is None
    assert prepared.eod_id is None
    assert prepared.vocab_size == planned_vocab_size(config) == 90
    assert prepared.train[0].prefix == prepared.validation[0].prefix == foreign
    assert prepared.train_tokens + prepared.validation_tokens == IndexedReader(foreign).num_tokens
    assert prepared.train_documents + prepared.validation_documents == 200
    assert not list(prepared.folder.glob("*.bin"))  # no copy
    assert 0 < prepared.unigram_entropy_nats < 5


def test_parts_of_ready_shards_are_disjoint_and_whole(foreign: Path) -> None:
    reader = IndexedReader(foreign)
    train, validation = (documents_of_part(reader, part, 0.1).tolist() for part in (Part.train, Part.validation))
    assert sorted(train + validation) == list(range(200))
    assert 5 < len(validation) < 40


@pytest.mark.parametrize("chunk", [1, 7, 100, 4000, 10**6])
def test_counts_do_not_depend_on_the_chunks(foreign: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(ready, "CHUNK_TOKENS", chunk)
    reader = IndexedReader(foreign)
    chosen = np.arange(200) % 3 == 0
    for found, flags in zip(
        ready.count_tokens(reader, chosen, lambda tokens, lengths: None), (~chosen, chosen), strict=True
    ):
        expected = np.bincount(np.concatenate([reader.document(i) for i in np.flatnonzero(flags)]))
        assert np.array_equal(found, expected)


def test_samples_of_a_part_come_from_its_documents_only(foreign: Path, config_for: ConfigFor, silent: Silent) -> None:
    config = config_for(foreign, vocab_size=90, seq_length=5)
    prepared = prepare(config, report=silent)
    reader = IndexedReader(foreign)
    for shard, dataset in (
        (prepared.train[0], training_dataset(prepared, config, windows(config))),
        (prepared.validation[0], validation_dataset(prepared, config, windows(config))),
    ):
        documents = documents_of_part(reader, shard.part, shard.validation_fraction)
        counts = sum(np.bincount(reader.document(i), minlength=90) for i in documents)
        assert int(np.sum(counts)) == shard.tokens
        per_epoch = (shard.tokens - 1) // 5
        seen = np.zeros(90, np.int64)
        for i in range(per_epoch):
            seen += np.bincount(dataset.sample(i).tokens[:-1], minlength=90)
        assert np.all(seen <= counts)
        assert int(seen.sum()) == per_epoch * 5


def test_own_shards_bring_their_tokenizer(
    prepared_corpus: tuple[PreparedData, RunConfig], config_for: ConfigFor, silent: Silent
) -> None:
    made, _ = prepared_corpus
    config = config_for(str(made.train[0].prefix) + ".bin", validation_source=str(made.validation[0].prefix))
    tokenizer = made.open_tokenizer()
    assert tokenizer is not None
    assert planned_vocab_size(config) == tokenizer.vocab_size
    prepared = prepare(config, report=silent)
    assert prepared.tokenizer_hash == made.tokenizer_hash
    assert prepared.eod_id == 0
    assert prepared.vocab_size == tokenizer.vocab_size
    assert prepared.train_tokens == made.train_tokens
    assert prepared.validation_tokens == made.validation_tokens
    dataset = training_dataset(prepared, config, windows(config))
    assert [dataset.sample(i).tokens.tolist() for i in range(9)] == [
        training_dataset(made, config, windows(config)).sample(i).tokens.tolist() for i in range(9)
    ]


@obeys("megatron_lite/data/shards/ready.py:_check_tokenizer")
def test_wrong_tokenizer_for_a_shard(
    tmp_path: Path, prepared_corpus: tuple[PreparedData, RunConfig], config_for: ConfigFor, silent: Silent
) -> None:
    made, _ = prepared_corpus
    (tmp_path / "x.txt").write_text("\n\n".join(f"other text {i * i}" for i in range(50)))
    other = prepare(config_for(tmp_path / "x.txt", tokenizer_vocab_size=390), report=silent)
    config = config_for(made.train[0].prefix, tokenizer=str(other.tokenizer_dir))
    with pytest.raises(DataError) as error:
        prepare(config, report=silent)
    assert str(error.value) == (
        f"data.source={made.train[0].prefix} was made with another tokenizer (hash {str(made.tokenizer_hash)[:12]}) "
        f"than data.tokenizer={other.tokenizer_dir} (hash {str(other.tokenizer_hash)[:12]}); name the tokenizer of the "
        "shards in data.tokenizer"
    )
    config.data.tokenizer = str(made.tokenizer_dir)
    assert prepare(config, report=silent).tokenizer_hash == made.tokenizer_hash


@obeys("megatron_lite/data/shards/ready.py:shared_tokenizer")
def test_shards_of_different_tokenizers(
    tmp_path: Path, prepared_corpus: tuple[PreparedData, RunConfig], config_for: ConfigFor, silent: Silent
) -> None:
    made, _ = prepared_corpus
    (tmp_path / "x.txt").write_text("\n\n".join(f"other text {i * i}" for i in range(50)))
    other = prepare(config_for(tmp_path / "x.txt", tokenizer_vocab_size=390), report=silent)
    with pytest.raises(DataError, match=r"data\.source names shards that different tokenizers made \(.* and .*\)"):
        prepare(config_for([made.train[0].prefix, other.train[0].prefix]), report=silent)
    other = prepare(config_for(tmp_path / "x.txt", tokenizer=str(made.tokenizer_dir)), report=silent)
    both = prepare(config_for([made.train[0].prefix, other.train[0].prefix]), report=silent)
    assert both.tokenizer_hash == made.tokenizer_hash


@obeys("megatron_lite/data/shards/prepared.py:_vocab_size")
def test_ids_beyond_the_vocabulary(foreign: Path, config_for: ConfigFor, silent: Silent) -> None:
    with pytest.raises(DataError) as error:
        prepare(config_for(foreign, vocab_size=89), report=silent)
    assert str(error.value) == (
        f"{foreign}.bin holds token id 89, but the vocabulary ends at 88: it was made with another tokenizer; name "
        "that tokenizer in data.tokenizer, or set model.vocab_size"
    )
    assert prepare(config_for(foreign, vocab_size=90), report=silent).vocab_size == 90


@obeys("megatron_lite/data/tokenizer/vocabulary.py:planned_vocab_size")
def test_unknown_vocabulary(tmp_path: Path, foreign: Path, config_for: ConfigFor, silent: Silent) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.vocab_size=null is unknown for ready shards without a tokenizer; set it"
    ):
        prepare(config_for(foreign), report=silent)
    with pytest.raises(ConfigError, match=r"model\.vocab_size=null cannot be derived from data\.tokenizer=train"):
        planned_vocab_size(config_for(foreign))
    assert planned_vocab_size(config_for(foreign, vocab_size=90)) == 90
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 89}}}')
    assert planned_vocab_size(config_for(foreign, tokenizer=str(tmp_path / "t"))) == 90


@obeys("megatron_lite/data/shards/prepare.py:_check_tokenizer")
def test_text_beside_ready_shards_needs_a_named_tokenizer(
    foreign: Path, corpus: Path, prepared_corpus: tuple[PreparedData, RunConfig], config_for: ConfigFor, silent: Silent
) -> None:
    made, _ = prepared_corpus
    with pytest.raises(
        ConfigError, match=r"data\.tokenizer=train cannot be used with data\.source\[1\]=.*foreign, which another"
    ):
        prepare(config_for([corpus, foreign]), report=silent)
    config = config_for([corpus, made.train[0].prefix], tokenizer=str(made.tokenizer_dir), weights=[1.0, 1.0])
    prepared = prepare(config, report=silent)
    assert [shard.source_index for shard in prepared.train] == [0, 1]
    assert prepared.weights == (0.5, 0.5)
    assert len(training_dataset(prepared, config, windows(config)).sample(0).tokens) == 17


def test_scan_is_done_once(foreign: Path, config_for: ConfigFor) -> None:
    lines: list[str] = []
    config = config_for(foreign, vocab_size=90)
    prepare(config, report=lines.append)
    assert any(line.startswith("reading ") for line in lines)
    lines.clear()
    prepare(config, report=lines.append)
    assert lines == []


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@obeys("megatron_lite/data/corpus/sources.py:_half")
def test_missing_half(foreign: Path, config_for: ConfigFor, silent: Silent, suffix: str) -> None:
    half = foreign.with_name(f"foreign{suffix}").rename(foreign.with_name("elsewhere"))
    with pytest.raises(
        DataError, match=rf"data\.source=.*foreign: .*foreign\{suffix} does not exist; Megatron shards are"
    ):
        prepare(config_for(foreign, vocab_size=90), report=silent)
    half.rename(foreign.with_name(f"foreign{suffix}"))
    assert prepare(config_for(foreign, vocab_size=90), report=silent).train_documents


def test_truncated_after_it_was_read(foreign: Path, config_for: ConfigFor, silent: Silent) -> None:
    config = config_for(foreign, vocab_size=90)
    prepare(config, report=silent)
    path = foreign.with_name("foreign.bin")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 2)
    with pytest.raises(DataError) as error:
        prepare(config, report=silent)
    assert str(error.value) == f"{path} is {size - 2:,} bytes; foreign.idx expects {size:,} (truncated); {OTHERS}"


@obeys("megatron_lite/data/shards/ready.py:check_ready")
def test_empty_shards(foreign: Path, tmp_path: Path, config_for: ConfigFor, silent: Silent) -> None:
    IndexedWriter(tmp_path / "empty", np.uint16).finish()
    with pytest.raises(DataError, match=r"empty\.bin holds no tokens; name shards with documents in them"):
        prepare(config_for(tmp_path / "empty", vocab_size=9), report=silent)
    assert prepare(config_for(foreign, vocab_size=90), report=silent).train_documents


@obeys("megatron_lite/data/shards/ready.py:_check_ids")
def test_file_that_holds_no_ids(foreign: Path, tmp_path: Path, config_for: ConfigFor, silent: Silent) -> None:
    writer = IndexedWriter(tmp_path / "x", np.int32)
    writer.add(np.array([1, 2, -3, 4]), np.array([2, 2]))
    writer.finish()
    config = config_for(tmp_path / "x", vocab_size=9, validation_source=str(tmp_path / "x"))
    with pytest.raises(DataError, match=r"x\.bin holds -3, which cannot be a token id; name Megatron"):
        prepare(config, report=silent)
    assert prepare(config_for(foreign, vocab_size=90), report=silent).train_documents


def test_nothing_held_out_of_a_ready_shard(foreign: Path, config_for: ConfigFor, silent: Silent) -> None:
    with pytest.raises(
        DataError, match=r"data\.validation_fraction=1e-07 holds out none of the 200 documents; use 0\.0"
    ):
        prepare(config_for(foreign, vocab_size=90, validation_fraction=1e-7), report=silent)


def test_shards_copied_without_their_tokenizer(
    tmp_path: Path, prepared_corpus: tuple[PreparedData, RunConfig], config_for: ConfigFor, silent: Silent
) -> None:
    made, _ = prepared_corpus
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(str(made.train[0].prefix) + suffix, tmp_path / f"copy{suffix}")
    prepared = prepare(config_for(tmp_path / "copy"), report=silent)
    assert prepared.tokenizer_dir is None
    assert prepared.eod_id == made.eod_id  # from the sidecar
    assert prepared.tokenizer_hash == made.tokenizer_hash
