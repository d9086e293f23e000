"""From sources to a published folder: what is made of them, and that it is made once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.corpus.source_names import resolve_sources
from megatron_lite.data.corpus.sources import Source
from megatron_lite.data.shards import prepare as prepare_module
from megatron_lite.data.shards import tokenise
from megatron_lite.data.shards.indexed import IndexedReader
from megatron_lite.data.shards.prepare import load_prepared, planned_vocab_size, prepare, prepared_folder
from megatron_lite.data.shards.prepared import PreparedData
from megatron_lite.data.shards.statistics import unigram_cross_entropy_nats
from megatron_lite.data.shards.tokenise import SourceSets, TokenisationJob
from tests.unit.data.conftest import document, texts_of

ConfigFor = Callable[..., RunConfig]
Silent = Callable[[str], None]
REPOSITORY = Path(__file__).resolve().parents[4]


def test_documents_are_split_completely_and_end_with_the_eod(prepared_corpus: tuple[PreparedData, RunConfig]) -> None:
    prepared, _ = prepared_corpus
    train, validation = texts_of(prepared, prepared.train), texts_of(prepared, prepared.validation)
    assert len(validation) == prepared.validation_documents > 3
    assert len(train) == prepared.train_documents > 90
    assert all(text.count("<|endoftext|>") == 1 and text.endswith("<|endoftext|>") for text in train + validation)
    assert sorted(train + validation) == sorted(document(i) + "<|endoftext|>" for i in range(120))


def test_counts_and_tokens(prepared_corpus: tuple[PreparedData, RunConfig]) -> None:
    prepared, config = prepared_corpus
    assert prepared.train_tokens == IndexedReader(prepared.train[0].prefix).num_tokens
    assert prepared.validation_tokens == IndexedReader(prepared.validation[0].prefix).num_tokens
    assert prepared.vocab_size == planned_vocab_size(config) == 510
    assert prepared.eod_id == 0


def test_equal_documents_never_fall_into_both_sets(tmp_path: Path, config_for: ConfigFor, silent: Silent) -> None:
    path = tmp_path / "twice.txt"
    path.write_text("\n\n".join(document(i % 60) for i in range(180)))
    prepared = prepare(config_for(path, validation_fraction=0.3), report=silent)
    train, validation = (set(texts_of(prepared, shards)) for shards in (prepared.train, prepared.validation))
    assert len(train) + len(validation) == 60
    assert not train & validation


def test_split_of_a_document_does_not_depend_on_the_others(
    tmp_path: Path, corpus: Path, config_for: ConfigFor, silent: Silent
) -> None:
    first = prepare(config_for(corpus), report=silent)
    reversed_path = tmp_path / "reversed.txt"
    reversed_path.write_text("\n\n".join(document(i) for i in reversed(range(10, 120))))
    second = prepare(config_for(reversed_path), report=silent)
    dropped = {document(i) + "<|endoftext|>" for i in range(10)}
    held_out = [set(texts_of(prepared, prepared.validation)) for prepared in (first, second)]
    assert held_out[0] - dropped == held_out[1]


def test_second_call_does_nothing(corpus: Path, config_for: ConfigFor) -> None:
    lines: list[str] = []
    first = prepare(config_for(corpus), report=lines.append)
    assert lines
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    lines.clear()
    assert prepare(config_for(corpus), report=lines.append) == first
    assert lines == []
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before
    assert load_prepared(first.folder, config_for(corpus)) == first


def test_same_text_gives_the_same_fingerprint_anywhere(
    tmp_path: Path, corpus: Path, config_for: ConfigFor, silent: Silent
) -> None:
    first = prepare(config_for(corpus), report=silent)
    other = tmp_path / "elsewhere" / "corpus.txt"
    other.parent.mkdir()
    shutil.copy(corpus, other)
    config = config_for(other, cache_dir=str(tmp_path / "other_cache"))
    second = prepare(config, report=silent)
    assert second.folder.name == first.folder.name
    assert second.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("key", "value"),
    [("tokenizer_vocab_size", 410), ("validation_fraction", 0.2), ("document_separator", " "), ("tokenizer", "other")],
)
def test_what_decides_the_shards_names_the_folder(corpus: Path, config_for: ConfigFor, key: str, value: object) -> None:
    assert prepared_folder(config_for(corpus, **{key: value})) != prepared_folder(config_for(corpus))


def test_what_does_not_decide_them_does_not(corpus: Path, config_for: ConfigFor) -> None:
    config = config_for(corpus, seq_length=99, weights=[2.0], mask_loss_after_eod=True, num_workers=1, text_key="body")
    config.train.seed = 77
    assert prepared_folder(config) == prepared_folder(config_for(corpus))


def test_changed_text_is_prepared_again(corpus: Path, config_for: ConfigFor, silent: Silent) -> None:
    first = prepare(config_for(corpus), report=silent)
    corpus.write_text(corpus.read_text().replace("document 5:", "document V:"))
    second = prepare(config_for(corpus), report=silent)
    assert second.folder != first.folder
    assert second.fingerprint != first.fingerprint


def test_batches_do_not_change_the_tokens(
    tmp_path: Path, corpus: Path, config_for: ConfigFor, silent: Silent, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(config_for(corpus), report=silent)
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 300)
    pieces = prepare(config_for(corpus, cache_dir=str(tmp_path / "other")), report=silent)
    assert pieces.fingerprint == whole.fingerprint


def test_validation_source_is_used_whole(tmp_path: Path, corpus: Path, config_for: ConfigFor, silent: Silent) -> None:
    (tmp_path / "v.txt").write_text("\n\n".join(document(i) for i in range(200, 205)))
    prepared = prepare(config_for(corpus, validation_source=str(tmp_path / "v.txt")), report=silent)
    assert prepared.train_documents == 120
    assert texts_of(prepared, prepared.validation) == [document(i) + "<|endoftext|>" for i in range(200, 205)]


def test_a_text_that_is_both_sets_is_tokenised_once(
    tmp_path: Path, corpus: Path, config_for: ConfigFor, silent: Silent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a checkpoint is evaluated on it."""
    shutil.copy(corpus, tmp_path / "copy.txt")
    config = config_for([tmp_path / "copy.txt", corpus])
    apart = prepare(replace(config, data=replace(config.data, validation_source=[str(corpus)])), report=silent)
    config.data.validation_source = [str(corpus), str(tmp_path / "copy.txt")]
    tokenised: list[str] = []
    original = prepare_module.tokenise_source

    def counted(job: TokenisationJob, source: Source, *arguments: Any) -> SourceSets:
        tokenised.append(source.name)
        return original(job, source, *arguments)

    monkeypatch.setattr(prepare_module, "tokenise_source", counted)
    prepared = prepare(config, report=silent)
    assert tokenised == config.data.source
    assert [shard.source for shard in prepared.validation] == config.data.validation_source
    assert [shard.source_index for shard in prepared.validation] == [0, 1]
    assert [Path(shard.files[0]) for shard in prepared.validation] == [corpus, tmp_path / "copy.txt"]
    assert prepared.validation_tokens == prepared.train_tokens == 2 * apart.validation_tokens
    assert [rows.source for rows in prepared.rows] == [*config.data.source, *config.data.validation_source]
    assert prepared.unigram_entropy_nats == pytest.approx(apart.unigram_entropy_nats)


def test_tokenizer_is_trained_without_the_held_out_documents(
    tmp_path: Path, config_for: ConfigFor, silent: Silent
) -> None:
    (tmp_path / "t.txt").write_text("\n\n".join(document(i) for i in range(50)))
    (tmp_path / "v.txt").write_text("\n\n".join("zyxwvzyxwv " * 50 for _ in range(5)))
    config = config_for(tmp_path / "t.txt", validation_source=str(tmp_path / "v.txt"))
    tokenizer = prepare(config, report=silent).open_tokenizer()
    assert tokenizer is not None
    assert len(tokenizer.encode("zyxwv")) == 5  # never seen, so never merged
    assert len(tokenizer.encode(" epsilon")) == 1


def test_held_out_documents_are_no_training_text(prepared_corpus: tuple[PreparedData, RunConfig]) -> None:
    prepared, config = prepared_corpus
    sources = resolve_sources(config.data.source, "data.source")
    texts = [text + "<|endoftext|>" for text in tokenise.training_texts(sources, config.data, 0.1)]
    assert texts == texts_of(prepared, prepared.train)


def test_training_text_is_bounded_and_shared_by_the_sources(
    tmp_path: Path, corpus: Path, config_for: ConfigFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.txt").write_text("\n\n".join(f"b{i}" for i in range(500)))
    config = config_for([corpus, tmp_path / "b.txt"])
    monkeypatch.setattr(tokenise, "TRAINING_TEXT_CHARACTERS", 600)
    sources = resolve_sources(config.data.source, "data.source")
    texts = list(tokenise.training_texts(sources, config.data, None))
    assert sum(len(text) for text in texts if text.startswith("b")) in range(300, 304)
    assert len([text for text in texts if text.startswith("document")]) == 2


def test_small_corpus_says_that_its_vocabulary_is_small(corpus: Path, config_for: ConfigFor) -> None:
    lines: list[str] = []
    prepared = prepare(config_for(corpus, tokenizer_vocab_size=5000), report=lines.append)
    assert any("the corpus is small: its vocabulary has" in line and "of 5,000 tokens" in line for line in lines)
    assert prepared.vocab_size == 5000  # what the plan promised; the ids beyond the tokenizer never occur


def test_unigram_entropy_against_its_definition(prepared_corpus: tuple[PreparedData, RunConfig]) -> None:
    prepared, _ = prepared_corpus
    train, validation = (IndexedReader(s[0].prefix).tokens for s in (prepared.train, prepared.validation))
    counts = np.bincount(train, minlength=510)
    losses = [-np.log((counts[token] + 1) / (len(train) + 510)) for token in validation]
    assert prepared.unigram_entropy_nats == pytest.approx(np.mean(losses), rel=1e-12)


def test_unigram_entropy_of_a_blend() -> None:
    a, b = np.array([8, 0]), np.array([0, 2])
    p = [0.25 * 9 / 10 + 0.75 * 1 / 4, 0.25 * 1 / 10 + 0.75 * 3 / 4]
    found = unigram_cross_entropy_nats([a, b], [0.25, 0.75], [np.array([3, 1])], [1.0], 2)
    assert found == pytest.approx(-(0.75 * np.log(p[0]) + 0.25 * np.log(p[1])), rel=1e-12)


def test_prepare_needs_no_torch() -> None:
    imported = "'torch' in sys.modules or 'pyarrow' in sys.modules"
    code = f"import sys; import megatron_lite.data.shards.prepare; sys.exit({imported})"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
