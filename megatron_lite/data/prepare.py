"""Corpus to shards: split documents, train or open the tokenizer, tokenise, write, publish.

`prepare` may be called by any number of processes and any number of times: the folder is named by a hash of
everything that decides its content, one process builds it, and it becomes visible only when it is complete.
This module and all it imports need no torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_lite.config.schema import DataConfig, RunConfig
from megatron_lite.data.blend import normalised
from megatron_lite.data.needs import require_tokens_of_run
from megatron_lite.data.prepared import (
    COUNTS,
    FORMAT,
    MANIFEST,
    Part,
    PreparedData,
    load_prepared,
    shard_entry,
    write_manifest,
)
from megatron_lite.data.publish import publish_folder
from megatron_lite.data.readers import read_documents
from megatron_lite.data.ready import scan_ready, shared_tokenizer
from megatron_lite.data.rows import RowCounts, require_few_bad
from megatron_lite.data.sentences import sentence_kinds
from megatron_lite.data.source_names import resolve_sources
from megatron_lite.data.sources import Source, identity
from megatron_lite.data.special import SpecialTokens
from megatron_lite.data.tokenise import Counted, Job, SourceSets, tokenise_source, training_texts
from megatron_lite.data.tokenizer import (
    TOKENIZER_FOLDER,
    Tokenizer,
    limit_threads,
    save_tokenizer,
    tokenizer_identity,
    train_bpe,
)
from megatron_lite.data.vocabulary import TRAIN, model_vocab_size, planned_vocab_size, trained_vocab_size
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.files import raise_open_file_limit

__all__ = ["PreparedData", "load_prepared", "planned_vocab_size", "prepare", "prepared_folder"]

PIPELINE = 3  # raise it when the same text would become other tokens


@dataclass(frozen=True)
class Plan:
    """What is to be prepared, and the hash that names it."""

    train: list[Source]
    validation: list[Source]
    """Empty when documents of `train` are held out."""
    trained_vocab_size: int | None
    """Size asked for of a tokenizer that is trained here, None for others."""
    key: dict[str, Any]

    @property
    def folder_name(self) -> str:
        label = "embedded" if self.train[0].name == "embedded" else Path(self.train[0].name).name.split(".")[0]
        safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in label)[:40]
        digest = xxhash.xxh3_128_hexdigest(json.dumps(self.key, sort_keys=True).encode())
        return f"{safe or 'data'}-{digest[:12]}"


def prepare(config: RunConfig, *, report: Callable[[str], None]) -> PreparedData:
    """Make the shards of a configuration, or find them made already.

    Args:
        report: receives a line for each stage that takes time; nothing when the data is already there.
    Raises:
        DataError: a source is missing, empty, binary, malformed or cut off, or cache_dir cannot be written.
        ConfigError: data.* or model.vocab_size do not fit each other.
    """
    raise_open_file_limit()
    plan = make_plan(config)
    folder = Path(config.data.cache_dir).expanduser() / plan.folder_name
    publish_folder(
        folder,
        lambda temporary: _build(plan, config, temporary, report),
        key=f"data.cache_dir={config.data.cache_dir}",
        report=report,
        marker=MANIFEST,
    )
    prepared = load_prepared(folder, config)
    for counts in prepared.rows:  # of data that another data.max_bad_fraction has prepared
        require_few_bad(counts, counts.source, config.data)
    return prepared


def prepared_folder(config: RunConfig) -> Path:
    """Where `prepare` puts, or has put, the shards of this configuration."""
    return Path(config.data.cache_dir).expanduser() / make_plan(config).folder_name


def make_plan(config: RunConfig) -> Plan:
    """Resolve and check everything that can be known before the first document is read."""
    data = config.data
    train = resolve_sources(data.source, "data.source")
    validation = resolve_sources(data.validation_source, "data.validation_source")
    if not train:
        raise ConfigError("data.source=null names no source; use embedded, a file or a dataset")
    if data.weights is not None:
        normalised(data.weights, len(train))
    if not validation and not 0 < data.validation_fraction < 1:
        raise ConfigError(
            f"data.validation_fraction={data.validation_fraction} must lie between 0 and 1; use 0.02, or give a "
            "data.validation_source"
        )
    trained_size = _check_tokenizer(config, [*train, *validation])
    key = {
        "pipeline": [PIPELINE, FORMAT],
        "train": [identity(source, data) for source in train],
        "validation": [identity(source, data) for source in validation],
        "held_out": None if validation else data.validation_fraction,
        "tokenizer": tokenizer_identity(data.tokenizer, data.tokenizer_vocab_size),
    }
    return Plan(train, validation, trained_size, key)


def _check_tokenizer(config: RunConfig, sources: list[Source]) -> int | None:
    """The size of a vocabulary that has to be trained, None where none has to be."""
    ready = [source for source in sources if not source.is_text]
    if config.data.tokenizer == TRAIN and 0 < len(ready) < len(sources):
        raise ConfigError(
            f"data.tokenizer=train cannot fit {ready[0]}, whose tokens another tokenizer made; name the folder of "
            "that tokenizer in data.tokenizer"
        )
    return trained_vocab_size(config.data) if config.data.tokenizer == TRAIN and not ready else None


def _build(plan: Plan, config: RunConfig, folder: Path, report: Callable[[str], None]) -> None:
    started = time.monotonic()
    limit_threads(config.data.num_workers)
    held_out = None if plan.validation else config.data.validation_fraction
    if held_out and _is_one_document(plan.train, config.data):  # said before a tokenizer is trained on it
        raise _one_document()
    job = _make_job(plan, config, folder, report)
    sets = [_ingest(job, source, i, Part.train, held_out) for i, source in enumerate(plan.train)]
    sets += [_ingest(job, source, i, Part.validation, None) for i, source in enumerate(plan.validation)]
    train = [found.train for found in sets if found.train is not None]
    validation = [found.validation for found in sets if found.validation is not None]
    if not validation:
        raise _nothing_held_out(config.data, sets)
    rows = [found.rows for found in sets if found.rows is not None]
    _write(plan, job, train, validation, rows)
    for counts in rows:
        for line in counts.lines():
            report(line)
    tokens = sum(counted.shard.tokens for counted in [*train, *validation])
    report(f"prepared {tokens:,} tokens in {time.monotonic() - started:.1f} s")


def _make_job(plan: Plan, config: RunConfig, folder: Path, report: Callable[[str], None]) -> Job:
    """Make or open the tokenizer, and put it into the folder. What speaks against it is said before a text is read.

    Raises:
        ConfigError: the vocabulary does not fit the model, or lacks what the run needs.
    """
    data = config.data
    target = home = folder / TOKENIZER_FOLDER
    sources = [*plan.train, *plan.validation]
    if data.tokenizer != TRAIN:
        tokenizer = save_tokenizer(data.tokenizer, target)
    elif plan.trained_vocab_size is not None:
        tokenizer = _train_tokenizer(plan, data, target, report)
    else:
        found, facts = shared_tokenizer(sources)
        if found is None:
            model_vocab_size(config, facts["vocab_size"], facts["vocab_size"])
            require_tokens_of_run(config, SpecialTokens.from_facts(facts), None)
            return Job(data, folder, None, facts, None, report)
        home, tokenizer = found, save_tokenizer(str(found), target)
    if plan.trained_vocab_size is None:
        model_vocab_size(config, tokenizer.vocab_size, tokenizer.vocab_size)
        require_tokens_of_run(config, tokenizer.special, home)
    facts = {
        "tokenizer_folder": TOKENIZER_FOLDER,
        "tokenizer_hash": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        **tokenizer.special.to_facts(),
    }
    return Job(data, folder, tokenizer, facts, sentence_kinds(tokenizer.pieces()), report)


def _train_tokenizer(plan: Plan, data: DataConfig, target: Path, report: Callable[[str], None]) -> Tokenizer:
    wanted = data.tokenizer_vocab_size
    report(f"training a byte-level BPE of {wanted:,} tokens on {', '.join(source.name for source in plan.train)}")
    held_out = None if plan.validation else data.validation_fraction
    tokenizer = train_bpe(training_texts(plan.train, data, held_out), wanted, target)
    if tokenizer.vocab_size < wanted:
        report(f"the corpus is small: its vocabulary has {tokenizer.vocab_size:,} of {wanted:,} tokens")
    return tokenizer


def _ingest(job: Job, source: Source, index: int, into: Part, held_out: float | None) -> SourceSets:
    if source.is_text:
        assert job.tokenizer is not None
        return tokenise_source(job, source, index, into, held_out)
    return scan_ready(job, source, index, into, held_out)


def _is_one_document(sources: list[Source], data: DataConfig) -> bool:
    """Whether that is all text there is; reads no further than into the second document."""
    if not all(source.is_text for source in sources):
        return False
    documents = chain.from_iterable(read_documents(source, data) for source in sources)
    return sum(1 for _ in islice(documents, 2)) == 1


def _one_document() -> DataError:
    return DataError(
        "data.source has 1 document; holding out a validation set takes 2 or more: set data.document_separator, or "
        "name a data.validation_source"
    )


def _nothing_held_out(data: DataConfig, sets: list[SourceSets]) -> DataError:
    documents = sum(found.train.shard.documents for found in sets if found.train is not None)
    if documents < 2:
        return _one_document()
    smallest = min(found.lowest_hash for found in sets) / 2**64
    return DataError(
        f"data.validation_fraction={data.validation_fraction} holds out none of the {documents} documents; use "
        f"{np.ceil(smallest * 1000) / 1000 + 0.001:.3f} or more, or name a data.validation_source"
    )


def _write(plan: Plan, job: Job, train: list[Counted], validation: list[Counted], rows: list[RowCounts]) -> None:
    counts: dict[str, Any] = {f"train_{i}": counted.counts for i, counted in enumerate(train)}
    counts |= {f"validation_{i}": counted.counts for i, counted in enumerate(validation)}
    np.savez_compressed(job.folder / COUNTS, **counts)
    tokenizer = job.tokenizer_facts
    shards = [counted.shard for counted in [*train, *validation]]
    decisive = [
        [s.bin_xxh3, s.idx_xxh3, s.part, s.validation_fraction, s.source_index, s.sentences_xxh3] for s in shards
    ]
    fingerprint = xxhash.xxh3_128_hexdigest(json.dumps([decisive, tokenizer["tokenizer_hash"], len(train)]).encode())
    manifest = {
        "format": FORMAT,
        "key": plan.key,
        "tokenizer": tokenizer,
        "vocab_size": plan.trained_vocab_size or tokenizer["vocab_size"],
        "train": [shard_entry(counted.shard, job.folder) for counted in train],
        "validation": [shard_entry(counted.shard, job.folder) for counted in validation],
        "separate_validation": bool(plan.validation),
        "rows": [asdict(counts) for counts in rows],
        "fingerprint": fingerprint,
    }
    write_manifest(job.folder, manifest)
