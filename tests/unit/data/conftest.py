"""Corpora of a few kilobytes, and a configuration that points at them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.samples.sample_types import WindowShape
from megatron_lite.data.shards.indexed import IndexedReader
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.data.shards.prepared import PreparedData, Shard

GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau"
WORDS = GREEK.split(" ")


def document(number: int, words: int = 40) -> str:
    """A text that no other number gives."""
    return f"document {number}: " + " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(words))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """120 documents, separated by empty lines."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(document(i) for i in range(120)), encoding="utf-8")
    return path


@pytest.fixture
def config_for(tmp_path: Path) -> Callable[..., RunConfig]:
    """A configuration for a source, with a small vocabulary and a cache of its own: config_for(source, key=value)."""

    def make(source: Any, **settings: Any) -> RunConfig:
        config = RunConfig()
        config.data.source = [str(s) for s in source] if isinstance(source, list) else str(source)
        config.data.cache_dir = str(tmp_path / "cache")
        config.data.tokenizer_vocab_size = 510
        config.data.seq_length = 16
        config.data.validation_fraction = 0.1
        for name, value in settings.items():
            setattr(config.model if name == "vocab_size" else config.data, name, value)
        return config

    return make


@pytest.fixture
def silent() -> Callable[[str], None]:
    return lambda line: None


@pytest.fixture
def prepared_corpus(corpus: Path, config_for: Callable[..., RunConfig]) -> tuple[PreparedData, RunConfig]:
    """`corpus`, prepared, with its configuration."""
    config = config_for(corpus)
    return prepare(config, report=lambda line: None), config


def windows(config: RunConfig) -> WindowShape:
    """The samples of causal language modelling."""
    return WindowShape(tokens=config.data.seq_length + 1, stride=config.data.seq_length)


def texts_of(prepared: PreparedData, shards: tuple[Shard, ...]) -> list[str]:
    """The documents of shards, decoded."""
    tokenizer = prepared.open_tokenizer()
    assert tokenizer is not None
    readers = [IndexedReader(shard.prefix) for shard in shards]
    return [tokenizer.decode(reader.document(i)) for reader in readers for i in range(reader.num_documents)]


def visible(folder: Path) -> list[str]:
    """What a user sees in a folder."""
    return [name for name in os.listdir(folder) if not name.startswith(".")]
