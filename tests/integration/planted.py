"""A corpus with garbage at known steps of a run: the tokens of some documents are replaced by random tokens."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_lite.config.compose import compose
from megatron_lite.data.samples.loader import training_dataset
from megatron_lite.data.samples.sample_types import WindowShape
from megatron_lite.data.samples.skips import Window
from megatron_lite.data.shards.indexed import IndexedReader, bin_path
from megatron_lite.data.shards.prepare import prepare


@dataclass(frozen=True)
class Planted:
    words: list[str]
    """Settings of the corpus with the garbage."""
    window: Window
    """Global samples that contain the garbage."""
    documents: set[int]
    """Numbers of the documents that contain it, in the pair of shard files."""


def plant(words: list[str], folder: Path, window: Window) -> Planted:
    """Prepare shards of the corpus that the overrides `words` describe, with random tokens in the samples of `window`.

    The order of samples depends only on the lengths of documents, so garbage changes only the tokens.
    """
    clean = prepare(compose("pretrain_gpt", words), report=lambda line: None)
    pair = folder / "pair"
    shutil.copytree(clean.folder, pair)
    ready = [word for word in words if not word.startswith(("data.source", "data.validation"))]
    ready += [f"data.source={pair / 'train-0'}", f"data.validation_source={pair / 'validation-0'}"]
    config = compose("pretrain_gpt", ready)
    prepared = prepare(config, report=lambda line: None)
    length = config.data.seq_length
    dataset = training_dataset(prepared, config, WindowShape(length + 1, length))
    reader = IndexedReader(pair / "train-0")
    tokens = np.memmap(bin_path(pair / "train-0"), dtype=reader.dtype, mode="r+")
    random, documents = np.random.default_rng(0), set[int]()
    for index in range(window.first, window.stop):
        for stretch in dataset.stretches(index):
            start = int(reader.document_starts[stretch.document]) + stretch.first_token
            tokens[start : start + stretch.tokens] = random.integers(10, prepared.vocab_size, stretch.tokens)
            documents.add(stretch.document)
    tokens.flush()
    for path in pair.glob("*-0.*"):
        path.chmod(0o600)  # files that quote its text must get the same mode
    return Planted([*ready, f"data.cache_dir={folder / 'prepared'}"], window, documents)
