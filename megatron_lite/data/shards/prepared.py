"""Prepared data: the content of the folder that `prepare` writes, and how a run opens it.

A prepared folder contains
    prepared.json           the manifest: identity, tokenizer, train and validation shards with sizes and checksums
    tokenizer/              a Hugging Face tokenizer folder
    train-<i>.bin .idx      shards of source i, with train-<i>.json, the sidecar to copy along with the pair
    validation-<i>.bin .idx
    <pair>.sentences        where sentences begin in a pair; also for existing shards whose tokenizer is known
    <pair>.origins          for each document of a pair made here, where it was read
    unigram_counts.npz      how often each token occurs, per source
Existing Megatron shards stay where they are: the manifest records the path that they had, and the configuration names
their current path. The manifest contains the checksum of every other file, and its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from fractions import Fraction
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.blend import ORDER, normalised, shares_of
from megatron_lite.data.corpus.rows import RowCounts
from megatron_lite.data.corpus.source_names import shard_prefix, source_names
from megatron_lite.data.sampler import mix64_array
from megatron_lite.data.sealed import read_sealed, sealed
from megatron_lite.data.shards.indexed import IndexedReader, bin_path, idx_path
from megatron_lite.data.shards.statistics import unigram_cross_entropy_nats
from megatron_lite.data.special import SpecialTokens, Vocabulary
from megatron_lite.data.tokenizer.needs import needs_sentences, no_sentences, require_tokens_of_run
from megatron_lite.data.tokenizer.saved_tokenizer import saved_files
from megatron_lite.data.tokenizer.tokenizer import Tokenizer, open_tokenizer
from megatron_lite.data.tokenizer.vocabulary import model_vocab_size
from megatron_lite.errors import DamagedFileError, DataError, library_edge
from megatron_lite.files import file_xxh3, replace_file
from megatron_lite.state_files import Object, read_object

MANIFEST = "prepared.json"
COUNTS = "unigram_counts.npz"
FORMAT = 4
CHEAP_CHECKSUM_BYTES = 64 * 2**20  # checksums of files up to this size are verified at every start; sizes always


class Part(StrEnum):
    """Which documents of a pair of files belong to a set."""

    everything = "everything"
    train = "train"
    validation = "validation"


@dataclass(frozen=True)
class Shard:
    """One source's share of the training or validation set."""

    source: str
    """The name in the configuration."""
    source_index: int
    """Its index in data.source, or in data.validation_source if that is set."""
    prefix: Path
    """The pair is prefix.bin and prefix.idx."""
    part: Part
    validation_fraction: float
    documents: int
    """Number of documents in this part."""
    tokens: int
    """Number of tokens in this part."""
    max_token_id: int
    bin_bytes: int
    idx_bytes: int
    bin_xxh3: str
    idx_xxh3: str
    sentences: Path | None = None
    """Where sentences begin in the whole pair (`sentences.read_sentences`); None = unknown."""
    sentences_bytes: int = 0
    sentences_xxh3: str | None = None
    files: tuple[str, ...] = ()
    """The files that its documents were read from (`Source.files`); empty for existing shards."""
    origins: Path | None = None
    """Where each document of the pair was read (`origins.read_origins`); None for existing shards."""
    origins_bytes: int = 0
    origins_xxh3: str | None = None


@dataclass(frozen=True)
class PreparedData:
    """A corpus that is ready to train on."""

    folder: Path
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]
    weights: tuple[Fraction, ...]
    """Share of training samples from each shard of `train`; they sum to 1."""
    validation_weights: tuple[Fraction, ...]
    tokenizer_dir: Path | None
    """None for existing shards that came without a tokenizer."""
    tokenizer_hash: str | None
    vocab_size: int
    """True vocabulary size of the model; every token id is below it."""
    special: SpecialTokens
    fingerprint: str
    """Identifies exactly these tokens in this order: equal fingerprints give equal samples for a seed and a length.

    With several sources, `.` and a hash of how they are blended (`blend_name`) are appended.
    """
    unigram_entropy_nats: float
    """Loss of the validation tokens under the training corpus' unigram distribution, nats per token."""
    rows: tuple[RowCounts, ...] = ()
    """Row counts of each text source; those of validation sources come last."""

    @property
    def train_tokens(self) -> int:
        return sum(shard.tokens for shard in self.train)

    @property
    def validation_tokens(self) -> int:
        return sum(shard.tokens for shard in self.validation)

    @property
    def train_documents(self) -> int:
        return sum(shard.documents for shard in self.train)

    @property
    def validation_documents(self) -> int:
        return sum(shard.documents for shard in self.validation)

    @property
    def eod_id(self) -> int | None:
        return self.special.eod

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What objectives know about the tokens. Its tables are None for existing shards without a tokenizer."""
        tokenizer = self.open_tokenizer()
        if tokenizer is None:
            return Vocabulary(self.vocab_size, self.special)
        return replace(tokenizer.vocabulary(), special=self.special).enlarged(self.vocab_size)

    def tokenizer_files(self, config: RunConfig) -> dict[str, bytes]:
        """Name -> content of the files from which AutoTokenizer reads this tokenizer.

        It adds the special tokens that training with this configuration added, see `saved_tokenizer`.
        """
        if self.tokenizer_dir is None:
            return {}
        return saved_files(self.tokenizer_dir, config, self.special)

    def open_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that made the tokens; None for existing shards without a tokenizer."""
        return open_tokenizer(str(self.tokenizer_dir)) if self.tokenizer_dir else None


def load_prepared(folder: Path, config: RunConfig) -> PreparedData:
    """Open a prepared folder for a run. Checks all sizes, and the checksums of small files.

    Raises:
        DataError: the folder is incomplete, or a shard is damaged.
        ConfigError: weights or vocabulary of the configuration do not fit it, or it lacks something that the run needs.
    """
    manifest = read_manifest(folder)
    train, validation = _shards_of_run(manifest, folder, config)
    check_files(manifest, folder)
    for shard in dict.fromkeys([*train, *validation]):
        check_shard(shard, folder, CHEAP_CHECKSUM_BYTES)
    tokenizer = manifest["tokenizer"]
    vocab_size = _vocab_size(config, manifest, [*train, *validation])
    weights = _weights(config, train)
    validation_weights = _validation_weights(manifest, weights, validation)
    counts = _read_counts(folder, len(train), len(validation))
    prepared = PreparedData(
        folder=folder,
        train=train,
        validation=validation,
        weights=weights,
        validation_weights=validation_weights,
        tokenizer_dir=_tokenizer_dir(tokenizer, folder),
        tokenizer_hash=tokenizer["tokenizer_hash"],
        vocab_size=vocab_size,
        special=SpecialTokens.from_facts(tokenizer),
        fingerprint=manifest["fingerprint"] + (f".{blend_name(weights)}" if len(weights) > 1 else ""),
        unigram_entropy_nats=unigram_cross_entropy_nats(counts[0], weights, counts[1], validation_weights, vocab_size),
        rows=tuple(msgspec.convert(manifest["rows"], list[RowCounts])),
    )
    require_tokens_of_run(config, prepared.special, prepared.tokenizer_dir)
    if needs_sentences(config.objective):
        for shard in (*train, *validation):
            if shard.sentences is None:
                raise no_sentences(shard.source)
    return prepared


def blend_name(weights: tuple[Fraction, ...]) -> str:
    """Identifies how sources are blended: their exact shares, and the version of the order."""
    return xxhash.xxh3_64_hexdigest(f"{ORDER} {' '.join(map(str, weights))}".encode())


def tokens_of(fingerprint: str) -> str:
    """The part of a fingerprint that identifies the tokens, without the order in which sources are blended."""
    return fingerprint.partition(".")[0]


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    Raises:
        DataError: it is missing, damaged, or has another format version.
    """
    path = folder / MANIFEST
    remedy = f"remove {folder} to prepare it again"
    try:
        version = (read_object(path, Object) or {}).get("format", FORMAT)
        if version != FORMAT:
            raise DataError(f"{path} has format {version}; this version reads {FORMAT}; {remedy}")
        manifest = read_sealed(path)
    except DamagedFileError as error:
        raise DataError(f"{error}; {remedy}") from None
    if manifest is None:
        raise DataError(f"{path} is missing; {remedy}")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any], shards: list[Shard]) -> None:
    """Write the manifest, adding the size and checksum of every file of the folder that belongs to no shard."""
    of_shards = {path for shard in shards for path, *_ in _recorded(shard)}
    others = sorted(path for path in folder.rglob("*") if path.is_file() and path not in of_shards)
    files = {path.relative_to(folder).as_posix(): [path.stat().st_size, file_xxh3(path)] for path in others}
    replace_file(folder / MANIFEST, sealed({**manifest, "files": files}))


def shard_entry(shard: Shard, folder: Path) -> dict[str, Any]:
    """The manifest entry of a shard; files inside the folder are stored by name, so that the folder can be moved."""
    inside = shard.prefix.parent == folder
    own = {name: path and path.name for name, path in (("sentences", shard.sentences), ("origins", shard.origins))}
    return {**asdict(shard), "prefix": shard.prefix.name if inside else str(shard.prefix), **own}


def shards_of(manifest: dict[str, Any], name: str, folder: Path) -> tuple[Shard, ...]:
    """The `train` or `validation` shards that a manifest lists."""
    return tuple(_shard_of(entry, folder) for entry in manifest[name])


def _shard_of(entry: dict[str, Any], folder: Path) -> Shard:
    own = {name: folder / entry[name] if entry[name] else None for name in ("sentences", "origins")}
    typed = {"prefix": folder / entry["prefix"], "part": Part(entry["part"]), "files": tuple(entry["files"])}
    return Shard(**entry | typed | own)


def _shards_of_run(
    manifest: dict[str, Any], folder: Path, config: RunConfig
) -> tuple[tuple[Shard, ...], tuple[Shard, ...]]:
    """The training and validation shards; existing pairs at their configured paths, because they may have moved."""
    sources = source_names(config.data.source)
    held_out = source_names(config.data.validation_source) if manifest["separate_validation"] else sources
    train, validation = (shards_of(manifest, name, folder) for name in ("train", "validation"))
    return (
        tuple(_where_it_lies(shard, folder, sources) for shard in train),
        tuple(_where_it_lies(shard, folder, held_out) for shard in validation),
    )


def _where_it_lies(shard: Shard, folder: Path, sources: list[str]) -> Shard:
    if shard.prefix.parent == folder or shard.source_index >= len(sources):
        return shard
    prefix = shard_prefix(Path(sources[shard.source_index]).expanduser())
    return shard if prefix is None else replace(shard, prefix=prefix.resolve())


Recorded = tuple[Path, int, str | None, str]
"""A file, its size in bytes, its checksum, and the name of the file that records its size."""


def _recorded(shard: Shard) -> Iterator[Recorded]:
    index = idx_path(shard.prefix)
    yield bin_path(shard.prefix), shard.bin_bytes, shard.bin_xxh3, index.name
    yield index, shard.idx_bytes, shard.idx_xxh3, index.name
    if shard.sentences:
        yield shard.sentences, shard.sentences_bytes, shard.sentences_xxh3, MANIFEST
    if shard.origins:
        yield shard.origins, shard.origins_bytes, shard.origins_xxh3, MANIFEST


def check_shard(shard: Shard, folder: Path, largest_read: float) -> None:
    """Compare the files of a shard with the sizes and checksums recorded when they were written.

    Args:
        largest_read: files of up to this many bytes are read to verify their checksums.
    Raises:
        DataError: a file is missing, or has another size or (if it is read) another checksum.
    """
    for recorded in _recorded(shard):
        _check_file(recorded, folder, largest_read)


def check_files(manifest: dict[str, Any], folder: Path) -> None:
    """As `check_shard`, for files that belong to no shard: tokenizer, sidecars, counts. All of them are small.

    Raises:
        DataError: a file is missing or damaged.
    """
    for name, (size, digest) in manifest["files"].items():
        _check_file((folder / name, size, digest, MANIFEST), folder, largest_read=inf)


def _check_file(recorded: Recorded, folder: Path, largest_read: float) -> None:
    path, size, digest, expected_by = recorded
    remedy = _remedy(path, folder)
    try:
        if not path.is_file():
            raise DataError(f"{path} is missing; {remedy}")
        found = path.stat().st_size
        if found != size:
            fault = "truncated" if found < size else "longer than written"
            raise DataError(f"{path} is {found:,} bytes; {expected_by} expects {size:,} ({fault}); {remedy}")
        if size <= largest_read and (actual := file_xxh3(path)) != digest:
            raise DataError(f"{path} has checksum {actual}; it was written with {digest} (damaged); {remedy}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; {remedy}") from error


def _remedy(path: Path, folder: Path) -> str:
    if path.is_relative_to(folder):
        return f"remove {folder} to prepare it again"
    return "copy it again from the original"


def _tokenizer_dir(tokenizer: dict[str, Any], folder: Path) -> Path | None:
    return folder / tokenizer["tokenizer_folder"] if tokenizer["tokenizer_folder"] else None


def _vocab_size(config: RunConfig, manifest: dict[str, Any], shards: list[Shard]) -> int:
    vocab_size = model_vocab_size(config, manifest["vocab_size"], manifest["tokenizer"]["vocab_size"])
    for shard in shards:
        if shard.max_token_id >= vocab_size:
            raise DataError(
                f"{bin_path(shard.prefix)} holds token id {shard.max_token_id:,}, but the vocabulary ends at "
                f"{vocab_size - 1:,}: it was made with another tokenizer; name that tokenizer in data.tokenizer, or "
                "set model.vocab_size"
            )
    return int(vocab_size)


def _weights(config: RunConfig, train: tuple[Shard, ...]) -> tuple[Fraction, ...]:
    given = config.data.weights
    return shares_of([shard.tokens for shard in train]) if given is None else normalised(given, len(train))


def _validation_weights(
    manifest: dict[str, Any], weights: tuple[Fraction, ...], validation: tuple[Shard, ...]
) -> tuple[Fraction, ...]:
    """Held-out documents are blended like the training set; separate validation sources by their size."""
    if manifest["separate_validation"]:
        return shares_of([shard.tokens for shard in validation])
    chosen = [weights[shard.source_index] for shard in validation]
    if sum(chosen) == 0:  # all sources with a positive weight are too small to hold out a document
        chosen = [Fraction(1)] * len(chosen)
    return shares_of(chosen)


def _read_counts(folder: Path, train: int, validation: int) -> tuple[list[npt.NDArray[np.int64]], ...]:
    path = folder / COUNTS
    with library_edge(DataError, f"{path} cannot be read", _remedy(path, folder)), np.load(path) as counts:
        return (
            [counts[f"train_{i}"] for i in range(train)],
            [counts[f"validation_{i}"] for i in range(validation)],
        )


def validation_threshold(fraction: float) -> int:
    """A document whose 64-bit hash is below this is held out."""
    return min(int(fraction * 2**64), 2**64 - 1)


def documents_of_part(reader: IndexedReader, part: Part, fraction: float) -> npt.NDArray[np.int64]:
    """Numbers of the documents of an existing shard that belong to a part, decided by a hash of their number."""
    numbers = np.arange(reader.num_documents, dtype=np.int64)
    if part is Part.everything:
        return numbers
    held_out = mix64_array(numbers.astype(np.uint64)) < np.uint64(validation_threshold(fraction))
    return numbers[held_out if part is Part.validation else ~held_out]
