"""From a corpus to shards: split off validation documents, train or open the tokenizer, tokenise, write, publish.

Any number of processes may call `prepare` any number of times: the folder's name contains a hash of everything that
determines its content, one process builds it, and it becomes visible only when it is complete. This module and its
imports do not need torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_lite.config.changes import DATA_KEYS, grade_changes, refusals
from megatron_lite.config.schema import DataConfig, RunConfig
from megatron_lite.data.blend import normalised
from megatron_lite.data.corpus.digests import remembered_digests
from megatron_lite.data.corpus.rows import RowCounts, require_few_bad
from megatron_lite.data.corpus.source_names import resolve_sources
from megatron_lite.data.corpus.sources import Source, SourceKind, identity
from megatron_lite.data.publish import publish_folder, require_folder
from megatron_lite.data.shards.held_out import check_held_out, nothing_held_out
from megatron_lite.data.shards.prepared import (
    COUNTS,
    FORMAT,
    MANIFEST,
    Part,
    PreparedData,
    load_prepared,
    shard_entry,
    write_manifest,
)
from megatron_lite.data.shards.ready import check_ready, scan_ready, shared_tokenizer
from megatron_lite.data.shards.sentences import sentence_kinds
from megatron_lite.data.shards.shard_ends import as_in_shards
from megatron_lite.data.shards.tokenise import (
    Counted,
    SourceSets,
    TokenisationJob,
    tokenise_source,
    training_texts,
)
from megatron_lite.data.special import SpecialTokens
from megatron_lite.data.tokenizer.bpe import train_bpe
from megatron_lite.data.tokenizer.framing import planned_ends, reads_documents
from megatron_lite.data.tokenizer.needs import needs_sentences, require_tokens_of_run
from megatron_lite.data.tokenizer.tokenizer import (
    Tokenizer,
    limit_threads,
    open_tokenizer,
    save_tokenizer,
    tokenizer_identity,
)
from megatron_lite.data.tokenizer.tokenizer_files import TOKENIZER_FOLDER
from megatron_lite.data.tokenizer.vocabulary import TRAIN, model_vocab_size, planned_vocab_size, trained_vocab_size
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.files import raise_open_file_limit
from megatron_lite.modes import allowed_mode, masked, narrow

__all__ = ["PreparedData", "load_prepared", "planned_vocab_size", "prepare", "prepared_folder"]

PIPELINE = 3  # increase it when the same text would become other tokens


@dataclass(frozen=True)
class PreparationPlan:
    """What to prepare, and the hash in the name of its folder."""

    train: list[Source]
    validation: list[Source]
    """Empty when documents of `train` are held out."""
    trained_vocab_size: int | None
    """Requested size of a tokenizer that is trained here; None for existing tokenizers."""
    key: dict[str, Any]

    @property
    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(json.dumps(self.key, sort_keys=True).encode())[:12]

    @property
    def forms(self) -> list[tuple[SourceKind, list[str]]]:
        """The file format of each source: the same documents may be stored in several formats."""
        return [(source.kind, [path.suffix for path in source.paths]) for source in (*self.train, *self.validation)]

    def folder_in(self, cache_dir: Path) -> Path:
        """The folder of its shards (existing or not): a readable label and the digest.

        The label comes from the name of the first source; an existing folder with another label is found, too.
        """
        label = "embedded" if self.train[0].name == "embedded" else Path(self.train[0].name).name.split(".")[0]
        safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in label)[:40]
        own = cache_dir / f"{safe or 'data'}-{self.digest}"
        made = [folder for folder in sorted(cache_dir.glob(f"*-{self.digest}")) if (folder / MANIFEST).is_file()]
        return own if own in made or not made else made[0]


def prepare(config: RunConfig, *, report: Callable[[str], None], earlier: RunConfig | None = None) -> PreparedData:
    """Create the shards of a configuration, or open existing ones.

    Args:
        report: receives a line for each stage that takes time; not called if the data already exists.
        earlier: the configuration that a resumed run was last trained with.
    Raises:
        DataError: a source is missing, empty, binary, malformed or truncated, or cache_dir cannot be written.
        ConfigError: data.* or model.vocab_size contradict each other, or this would prepare other data than that of
            `earlier`.
    """
    raise_open_file_limit()
    cache_dir, key = Path(config.data.cache_dir).expanduser(), f"data.cache_dir={config.data.cache_dir}"
    resolved_sources(config)  # report wrong sources before any folder is created
    require_folder(cache_dir, key)
    plan = make_plan(config, report)
    folder = plan.folder_in(cache_dir)
    if earlier is not None and not (folder / MANIFEST).is_file():
        refuse_other_data(plan, config, earlier, report)
    originals = list(_originals(plan, config.data))
    with masked(originals, folder):  # covers the caches of libraries, too
        publish_folder(
            folder,
            lambda temporary: _build(plan, config, temporary, report),
            key=key,
            report=report,
            marker=MANIFEST,
            originals=originals,
        )
    _keep_private(folder, originals, report)
    prepared = load_prepared(folder, config)
    texts = [source for source in (*plan.train, *plan.validation) if source.is_text]
    for source, counts in zip(texts, prepared.rows, strict=True):  # data.max_bad_fraction may have changed since
        require_few_bad(counts, str(source), config.data)
    return prepared


def _originals(plan: PreparationPlan, data: DataConfig) -> Iterator[Path]:
    """The files whose content is copied into the prepared data: those of the sources and of the tokenizer."""
    for source in (*plan.train, *plan.validation):
        for path in source.paths:
            if not source.is_text:
                yield from (path.with_name(path.name + suffix) for suffix in (".bin", ".idx"))
            else:
                yield from path.rglob("*") if path.is_dir() else [path]
    tokenizer = Path(data.tokenizer).expanduser()
    if tokenizer.is_dir():
        yield from tokenizer.rglob("*")


def _keep_private(folder: Path, originals: list[Path], report: Callable[[str], None]) -> None:
    """Restrict a folder that more users can read than its sources: an earlier version made it, or the modes of the
    sources have changed since."""
    allowed = allowed_mode(originals, folder.stat().st_gid)
    try:
        if narrow(folder, allowed):
            report(f"{folder} was readable by more users than its sources and tokenizer; its mode is now restricted")
    except OSError:
        report(
            f"warning: {folder} is readable by more users than its sources and tokenizer, but belongs to another "
            f"user; ask its owner for `chmod -R u=rwX,g={_letters(allowed >> 3)},o={_letters(allowed)} {folder}`"
        )


def _letters(mode: int) -> str:
    return "rX" if mode & 0o4 else ""


def refuse_other_data(
    plan: PreparationPlan, config: RunConfig, earlier: RunConfig, report: Callable[[str], None]
) -> None:
    """Refuse, before any work, to prepare data that the run cannot resume with, if the sources already show that.

    If the earlier sources are gone, or in another format (say, compressed), only the prepared tokens can show it: a
    resume compares their fingerprints.
    """
    changed = [change for change in grade_changes(earlier, config) if change.key in DATA_KEYS]
    if not changed:
        return
    try:
        before = make_plan(replace(earlier, data=replace(earlier.data, cache_dir=config.data.cache_dir)), report)
    except (DataError, ConfigError):
        return
    if before.forms == plan.forms and before.key != plan.key:
        raise ConfigError(refusals(changed, f"the run in train.run_dir={config.train.run_dir}"))


def prepared_folder(config: RunConfig) -> Path:
    """The folder of the shards that `prepare` creates for this configuration, existing or not."""
    return make_plan(config).folder_in(Path(config.data.cache_dir).expanduser())


def make_plan(config: RunConfig, report: Callable[[str], None] = lambda line: None) -> PreparationPlan:
    """Resolve and check everything that can be known before the first document is read.

    Args:
        report: receives progress lines while source files are read for their checksums.
    """
    data = config.data
    train, validation = resolved_sources(config)
    trained_size = _check_tokenizer(config, [*train, *validation])
    is_text = all(source.is_text for source in (*train, *validation))
    ends = planned_ends(config) if is_text else None  # existing shards have their own
    with remembered_digests(Path(data.cache_dir).expanduser(), report) as file_identity:
        identities = [[identity(source, data, file_identity) for source in sources] for sources in (train, validation)]
    key = {
        "pipeline": [PIPELINE, FORMAT],
        "train": identities[0],
        "validation": identities[1],
        "held_out": None if validation else data.validation_fraction,
        "tokenizer": tokenizer_identity(data, ends, reads_documents(config)),
    }
    return PreparationPlan(train, validation, trained_size, key)


def resolved_sources(config: RunConfig) -> tuple[list[Source], list[Source]]:
    """The training and validation sources, without reading their content.

    Raises:
        DataError: a source does not exist, or has an unknown format.
        ConfigError: data.weights or data.validation_fraction are wrong.
    """
    data = config.data
    train = resolve_sources(data.source, "data.source")
    validation = resolve_sources(data.validation_source, "data.validation_source")
    if not train:
        raise ConfigError("data.source=null names no source; use embedded, a file or a dataset")
    if data.weights is not None:
        normalised(data.weights, len(train))
    if not validation and not 0 < data.validation_fraction < 1:
        raise ConfigError(
            f"data.validation_fraction={data.validation_fraction} must be between 0 and 1; use 0.02, or set "
            "data.validation_source"
        )
    return train, validation


def _check_tokenizer(config: RunConfig, sources: list[Source]) -> int | None:
    """The size of the vocabulary to train; None if no tokenizer has to be trained."""
    ready = [source for source in sources if not source.is_text]
    if config.data.tokenizer == TRAIN and 0 < len(ready) < len(sources):
        raise ConfigError(
            f"data.tokenizer=train cannot be used with {ready[0]}, which another tokenizer encoded; name the folder of "
            "that tokenizer in data.tokenizer"
        )
    return trained_vocab_size(config.data) if config.data.tokenizer == TRAIN and not ready else None


def _build(plan: PreparationPlan, config: RunConfig, folder: Path, report: Callable[[str], None]) -> None:
    started = time.monotonic()
    limit_threads(config.data.num_workers)
    held_out = None if plan.validation else config.data.validation_fraction
    if held_out:  # report problems before a tokenizer is trained and before anything is tokenised
        check_held_out(plan.train, config.data)
    job = _make_job(plan, config, folder, report)
    for source in [*plan.train, *plan.validation]:
        if not source.is_text:
            check_ready(job, source, needs_sentences(config.objective))
    sets = [_ingest(job, source, i, Part.train, held_out) for i, source in enumerate(plan.train)]
    known = {
        (source.name, str(key)): found for source, key, found in zip(plan.train, plan.key["train"], sets, strict=True)
    }
    for i, (source, key) in enumerate(zip(plan.validation, plan.key["validation"], strict=True)):
        same = known.get((source.name, str(key)))  # as when a checkpoint is evaluated: both are the same text
        sets.append(_ingest(job, source, i, Part.validation, None) if same is None else _for_validation(same, i))
    train = [found.train for found in sets if found.train is not None]
    validation = [found.validation for found in sets if found.validation is not None]
    if not validation:  # existing shards whose held-out documents have no tokens
        documents = sum(counted.shard.documents for counted in train)
        raise nothing_held_out(config.data, documents, min(found.lowest_hash for found in sets))
    rows = [found.rows for found in sets if found.rows is not None]
    _write(plan, job, train, validation, rows)
    for counts in rows:
        for line in counts.lines():
            report(line)
    shards = (counted.shard for counted in [*train, *validation])
    tokens = sum({(shard.prefix, shard.part): shard.tokens for shard in shards}.values())  # a shard may be in both sets
    report(f"prepared {tokens:,} tokens in {time.monotonic() - started:.1f} s")


def _make_job(plan: PreparationPlan, config: RunConfig, folder: Path, report: Callable[[str], None]) -> TokenisationJob:
    """Train or open the tokenizer, and save it to the folder. It is checked before any text is read.

    Raises:
        ConfigError: the vocabulary does not fit the model, or lacks tokens that the run needs.
    """
    data = config.data
    target = home = folder / TOKENIZER_FOLDER
    sources = [*plan.train, *plan.validation]
    if data.tokenizer != TRAIN:
        tokenizer = _copied_tokenizer(data.tokenizer, target, config, sources)
    elif plan.trained_vocab_size is not None:
        tokenizer = _train_tokenizer(plan, data, target, report)
    else:
        found, facts = shared_tokenizer(sources)
        if found is None:
            model_vocab_size(config, facts["vocab_size"], facts["vocab_size"])
            require_tokens_of_run(config, SpecialTokens.from_facts(facts), None)
            return TokenisationJob(data, folder, None, facts, None, report)
        home, tokenizer = found, _copied_tokenizer(str(found), target, config, sources)
    model_vocab_size(config, tokenizer.vocab_size, tokenizer.vocab_size)
    if plan.trained_vocab_size is None:
        require_tokens_of_run(config, tokenizer.special, home)
    facts = {
        "tokenizer_folder": TOKENIZER_FOLDER,
        "tokenizer_hash": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        **tokenizer.special.to_facts(),
    }
    return TokenisationJob(data, folder, tokenizer, facts, sentence_kinds(tokenizer.pieces()), report)


def _copied_tokenizer(name: str, target: Path, config: RunConfig, sources: list[Source]) -> Tokenizer:
    is_decoder = reads_documents(config)
    opened = open_tokenizer(name, config.data, is_decoder=is_decoder)
    data = as_in_shards(config.data, sources, opened, is_decoder=is_decoder)
    return save_tokenizer(name, target, data, is_decoder=is_decoder)


def _train_tokenizer(plan: PreparationPlan, data: DataConfig, target: Path, report: Callable[[str], None]) -> Tokenizer:
    wanted = data.tokenizer_vocab_size
    report(f"training a byte-level BPE of {wanted:,} tokens on {', '.join(source.name for source in plan.train)}")
    held_out = None if plan.validation else data.validation_fraction
    texts = training_texts(plan.train, data, held_out)
    tokenizer = train_bpe(texts, wanted, target, data, report=report)
    if tokenizer.vocab_size < wanted:
        report(f"the corpus is small: its vocabulary has {tokenizer.vocab_size:,} of {wanted:,} tokens")
    return tokenizer


def _ingest(job: TokenisationJob, source: Source, index: int, into: Part, held_out: float | None) -> SourceSets:
    if source.is_text:
        assert job.tokenizer is not None
        return tokenise_source(job, source, index, into, held_out)
    return scan_ready(job, source, index, into, held_out)


def _for_validation(trained: SourceSets, index: int) -> SourceSets:
    """Reuse the tokens of a training source for a validation source with the same documents."""
    assert trained.train is not None
    shard = replace(trained.train.shard, source_index=index)
    return replace(trained, train=None, validation=replace(trained.train, shard=shard))


def _write(
    plan: PreparationPlan, job: TokenisationJob, train: list[Counted], validation: list[Counted], rows: list[RowCounts]
) -> None:
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
    write_manifest(job.folder, manifest, shards)
