"""Damaged shards, and corpora and settings of which no shards can be made."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.data.shards.prepared import PreparedData
from megatron_lite.errors import ConfigError, DataError
from tests.unit.remedies import obeys

ConfigFor = Callable[..., RunConfig]
Silent = Callable[[str], None]


def damage(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@obeys("megatron_lite/data/shards/prepared.py:_check_file")
def test_truncated_shard(prepared_corpus: tuple[PreparedData, RunConfig], silent: Silent) -> None:
    prepared, config = prepared_corpus
    path = prepared.train[0].prefix.with_name("train-0.bin")
    size = path.stat().st_size
    damage(path, lambda content: content[:-4])
    with pytest.raises(DataError) as error:
        prepare(config, report=silent)
    assert str(error.value) == (
        f"{path} is {size - 4:,} bytes; train-0.idx expects {size:,} (truncated); "
        f"remove {prepared.folder} to prepare it again"
    )
    shutil.rmtree(prepared.folder)
    assert prepare(config, report=silent) == prepared


def test_changed_byte_in_a_shard(prepared_corpus: tuple[PreparedData, RunConfig], silent: Silent) -> None:
    prepared, config = prepared_corpus
    path = prepared.validation[0].prefix.with_name("validation-0.idx")
    damage(path, lambda content: content[:-1] + b"\x01")
    with pytest.raises(
        DataError, match=r"validation-0\.idx has checksum \w+; it was written with \w+ \(damaged\); remove"
    ):
        prepare(config, report=silent)


def test_missing_shard(prepared_corpus: tuple[PreparedData, RunConfig], silent: Silent) -> None:
    prepared, config = prepared_corpus
    prepared.train[0].prefix.with_name("train-0.bin").unlink()
    with pytest.raises(DataError, match=r"train-0\.bin is missing; remove .* to prepare it again"):
        prepare(config, report=silent)


@obeys("megatron_lite/data/publish.py:_build_and_rename")
def test_folder_without_its_manifest(prepared_corpus: tuple[PreparedData, RunConfig], silent: Silent) -> None:
    prepared, config = prepared_corpus
    (prepared.folder / "prepared.json").unlink()
    with pytest.raises(DataError, match="is incomplete; remove it to prepare it again"):
        prepare(config, report=silent)
    shutil.rmtree(prepared.folder)
    assert prepare(config, report=silent) == prepared


@pytest.mark.parametrize("content", ["{", '{"format": 99}'])
@obeys("megatron_lite/data/shards/prepared.py:read_manifest")
def test_damaged_manifest(prepared_corpus: tuple[PreparedData, RunConfig], silent: Silent, content: str) -> None:
    prepared, config = prepared_corpus
    (prepared.folder / "prepared.json").write_text(content)
    with pytest.raises(DataError, match=r"prepared\.json (is damaged|has format 99).*; remove .* to prepare it again"):
        prepare(config, report=silent)
    shutil.rmtree(prepared.folder)
    assert prepare(config, report=silent) == prepared


@obeys("megatron_lite/data/corpus/rows.py:no_documents")
def test_corpus_without_text(tmp_path: Path, config_for: ConfigFor, silent: Silent) -> None:
    (tmp_path / "blank.txt").write_text("\n\n  \n\n")
    rule = r"data\.source=.*blank\.txt holds no text in its 2 rows \(2 empty: .*:1; .*:2\); name a source with "
    with pytest.raises(DataError, match=rule):
        prepare(config_for(tmp_path / "blank.txt"), report=silent)
    (tmp_path / "blank.txt").write_text("\n\n  \n\none\n\ntwo\n\nthree")
    assert prepare(config_for(tmp_path / "blank.txt", validation_fraction=0.5), report=silent).train_documents


@obeys("megatron_lite/data/shards/held_out.py:_one_document")
def test_one_document_cannot_be_split(corpus: Path, config_for: ConfigFor) -> None:
    """Said at once: the vocabulary of a large text takes minutes."""
    message = (
        r"has 1 document, but holding out .* 2 or more; "
        r"set data\.document_separator to what is between its documents, or set data\.validation_source$"
    )
    config = config_for(corpus, document_separator=None, validation_fraction=1e-9)
    reported: list[str] = []
    with pytest.raises(DataError, match=message):
        prepare(config, report=reported.append)
    assert not reported, "a tokenizer was trained first"
    config.data.validation_source = str(corpus)
    assert prepare(config, report=reported.append).train_documents == 1
    assert prepare(config_for(corpus, document_separator="\n\n"), report=reported.append).validation_documents


def test_a_separator_is_no_remedy_where_rows_are_documents(tmp_path: Path, config_for: ConfigFor) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "a document\\n\\nof two paragraphs"}\n')
    with pytest.raises(DataError, match=r"2 or more; set data\.validation_source$"):
        prepare(config_for(tmp_path / "one.jsonl"), report=pytest.fail)


@obeys("megatron_lite/data/shards/held_out.py:nothing_held_out")
def test_nothing_held_out_names_the_fraction_that_would(corpus: Path, config_for: ConfigFor, silent: Silent) -> None:
    with pytest.raises(
        DataError, match=r"data\.validation_fraction=0\.001 holds out none of the 120 doc.*; use 0\.\d+ or"
    ) as error:
        prepare(config_for(corpus, validation_fraction=0.001), report=silent)
    remedy = float(str(error.value).split("; use ")[1].split()[0])
    assert prepare(config_for(corpus, validation_fraction=remedy), report=silent).validation_documents >= 1


@obeys("megatron_lite/data/shards/tokenise.py:all_held_out")
def test_everything_held_out(corpus: Path, config_for: ConfigFor, silent: Silent) -> None:
    message = r"data\.validation_fraction=0\.999999 holds out every document of data\.source="
    with pytest.raises(DataError, match=message):
        prepare(config_for(corpus, validation_fraction=0.999999), report=silent)
    assert prepare(config_for(corpus, validation_fraction=0.5), report=silent).validation_documents >= 1


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_fraction_out_of_range(corpus: Path, config_for: ConfigFor, silent: Silent, fraction: float) -> None:
    with pytest.raises(ConfigError, match=rf"data\.validation_fraction={fraction} must be between 0 and 1"):
        prepare(config_for(corpus, validation_fraction=fraction), report=silent)


def test_wrong_number_of_weights(tmp_path: Path, corpus: Path, config_for: ConfigFor, silent: Silent) -> None:
    with pytest.raises(ConfigError, match=r"data\.weights=\[1, 2\] has 2 entries for 1 sources"):
        prepare(config_for(corpus, weights=[1.0, 2.0]), report=silent)
    assert not (tmp_path / "cache").exists()


def test_vocabulary_too_small_for_the_tokenizer(corpus: Path, config_for: ConfigFor, silent: Silent) -> None:
    message = r"model\.vocab_size=300 must hold the \d+ tokens of data\.tokenizer=train; use \d+ or more, or null"
    with pytest.raises(ConfigError, match=message):
        prepare(config_for(corpus, vocab_size=300), report=silent)


def test_vocabulary_larger_than_the_tokenizer(corpus: Path, config_for: ConfigFor, silent: Silent) -> None:
    assert prepare(config_for(corpus, vocab_size=1000), report=silent).vocab_size == 1000
