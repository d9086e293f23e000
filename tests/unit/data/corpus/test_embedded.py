"""The embedded corpus, prepared for real."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.corpus.embedded import embedded_documents, embedded_files
from megatron_lite.data.shards.indexed import IndexedReader
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.data.shards.prepared import PreparedData


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    config = RunConfig()
    config.data.tokenizer_vocab_size = 1024
    config.data.cache_dir = str(tmp_path_factory.mktemp("embedded"))
    return prepare(config, report=lambda line: None)


def test_embedded_corpus(embedded: PreparedData) -> None:
    assert embedded.train_documents + embedded.validation_documents > 500
    assert embedded.train_tokens > 2_000_000
    assert 0.005 < embedded.validation_documents / embedded.train_documents < 0.05
    assert 3.0 < embedded.unigram_entropy_nats < np.log(1024)
    assert embedded.folder.name.startswith("embedded-")
    tokenizer = embedded.open_tokenizer()
    assert tokenizer is not None
    first = tokenizer.decode(IndexedReader(embedded.train[0].prefix).document(0))
    assert first.removesuffix("<|endoftext|>") in {text for text, _, _ in embedded_documents()}


def test_embedded_corpus_is_the_library_without_tests() -> None:
    names = {path.as_posix() for path in embedded_files()}
    assert any(name.endswith("/argparse.py") for name in names)
    for unwanted in ("/test/", "/tests/", "/idle_test/", "/site-packages/", "pydoc_data/topics.py", "/_sysconfigdata"):
        assert not any(unwanted in name for name in names)
    documents = [text for text, _, _ in embedded_documents()]
    assert any(text.startswith("The") and "assert" in text for text in documents[len(names) :])  # the topics follow
    assert len(documents) - len(names) > 50


def test_embedded_sidecar(embedded: PreparedData) -> None:
    sidecar = json.loads(embedded.train[0].prefix.with_name("train-0.json").read_text())
    assert sidecar["tokenizer_hash"] == embedded.tokenizer_hash
    assert sidecar["tokens"] == embedded.train_tokens
    assert sidecar["bin_bytes"] == 2 * embedded.train_tokens


def test_embedded_preparation_is_found_again_at_once(embedded: PreparedData) -> None:
    config = RunConfig()
    config.data.tokenizer_vocab_size = 1024
    config.data.cache_dir = str(embedded.folder.parent)
    lines: list[str] = []
    assert prepare(config, report=lines.append) == embedded
    assert lines == []
