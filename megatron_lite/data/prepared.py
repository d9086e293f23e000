"""Prepared data: what `prepare` leaves in its folder, and how it is opened again.

A prepared folder holds
    prepared.json           the manifest: identity, tokenizer, train and validation shards with sizes and checksums
    tokenizer/              a Hugging Face tokenizer folder
    train-<i>.bin .idx      shards of source i, beside them train-<i>.json, the sidecar that goes with a copied pair
    validation-<i>.bin .idx
    <pair>.sentences        where sentences begin in a pair; also for ready shards whose tokenizer is known
    <pair>.origins          for each document of a pair made here, where it was read
    unigram_counts.npz      how often each token occurs, for each source
Ready Megatron shards stay where they are; the manifest then names them by their absolute path.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.blend import normalised
from megatron_lite.data.indexed import IndexedReader, bin_path, idx_path
from megatron_lite.data.needs import require_tokens_of_run
from megatron_lite.data.rows import RowCounts
from megatron_lite.data.sampler import mix64_array
from megatron_lite.data.special import SpecialTokens, Vocabulary
from megatron_lite.data.statistics import unigram_cross_entropy_nats
from megatron_lite.data.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, Tokenizer, open_tokenizer
from megatron_lite.data.vocabulary import model_vocab_size
from megatron_lite.errors import DataError
from megatron_lite.files import file_xxh3

MANIFEST = "prepared.json"
COUNTS = "unigram_counts.npz"
FORMAT = 3
CHEAP_CHECKSUM_BYTES = 64 * 2**20  # up to this size checksums are verified at every opening; sizes always are


class Part(StrEnum):
    """Which documents of a pair of files belong to a set."""

    everything = "everything"
    train = "train"
    validation = "validation"


@dataclass(frozen=True)
class Shard:
    """One source's share of the training or validation set."""

    source: str
    """As the user named it."""
    source_index: int
    """Its place in data.source, or in data.validation_source where that is given."""
    prefix: Path
    """The pair is prefix.bin and prefix.idx."""
    part: Part
    validation_fraction: float
    documents: int
    """Of this part."""
    tokens: int
    """Of this part."""
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
    """What its documents were read from (`Source.files`), where they were prepared; empty = the pair is a ready one."""
    origins: Path | None = None
    """Where each document of the pair was read (`origins.read_origins`); None = in the pair itself."""
    origins_bytes: int = 0
    origins_xxh3: str | None = None


@dataclass(frozen=True)
class PreparedData:
    """A corpus that is ready to train on."""

    folder: Path
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]
    weights: tuple[float, ...]
    """Share of training samples from each shard of `train`; they sum to 1."""
    validation_weights: tuple[float, ...]
    tokenizer_dir: Path | None
    """None for ready shards that came without a tokenizer."""
    tokenizer_hash: str | None
    vocab_size: int
    """True vocabulary of the model; every token id is below it."""
    special: SpecialTokens
    fingerprint: str
    """Names exactly these tokens in this order: equal fingerprints, equal samples."""
    unigram_entropy_nats: float
    """Loss of the validation tokens under the training corpus' unigram distribution, nats per token."""
    rows: tuple[RowCounts, ...] = ()
    """What became of the rows of each source of text, those of validation sources last."""

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
        """What objectives know of the tokens. Its tables stay None for ready shards that came without a tokenizer."""
        tokenizer = self.open_tokenizer()
        if tokenizer is None:
            return Vocabulary(self.vocab_size, self.special)
        return tokenizer.vocabulary().enlarged(self.vocab_size)

    def tokenizer_files(self) -> dict[str, bytes]:
        """Name -> content of the files that make any folder one from which AutoTokenizer reads this tokenizer."""
        if self.tokenizer_dir is None:
            return {}
        return {name: (self.tokenizer_dir / name).read_bytes() for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)}

    def open_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that made the tokens, None where there is none."""
        return open_tokenizer(str(self.tokenizer_dir)) if self.tokenizer_dir else None


def load_prepared(folder: Path, config: RunConfig) -> PreparedData:
    """Open a prepared folder for a run. Checks sizes always, checksums where that takes no time.

    Raises:
        DataError: the folder is incomplete, or a shard is not what was written.
        ConfigError: weights or vocabulary of the configuration do not fit it, or it lacks what the run needs.
    """
    manifest = read_manifest(folder)
    train, validation = (shards_of(manifest, name, folder) for name in ("train", "validation"))
    for shard in dict.fromkeys([*train, *validation]):
        check_shard(shard, folder, checksum=shard.bin_bytes <= CHEAP_CHECKSUM_BYTES)
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
        fingerprint=manifest["fingerprint"],
        unigram_entropy_nats=unigram_cross_entropy_nats(counts[0], weights, counts[1], validation_weights, vocab_size),
        rows=tuple(msgspec.convert(manifest["rows"], list[RowCounts])),
    )
    require_tokens_of_run(config, prepared.special, prepared.tokenizer_dir)
    return prepared


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove {folder} to prepare it again") from None
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"{path} has format {manifest.get('format')}; this version reads {FORMAT}; remove {folder} to prepare it "
            "again"
        )
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def shard_entry(shard: Shard, folder: Path) -> dict[str, Any]:
    """A shard as the manifest holds it: own files by name, so that the folder can be moved."""
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


def check_shard(shard: Shard, folder: Path, *, checksum: bool) -> None:
    """Compare the files of a shard of a prepared folder with what was recorded when they were made.

    Raises:
        DataError: a file is missing, longer or shorter, or (with `checksum`) has other bytes.
    """
    index = idx_path(shard.prefix)
    recorded: list[tuple[Path, int, str | None, str]] = [
        (bin_path(shard.prefix), shard.bin_bytes, shard.bin_xxh3, index.name),
        (index, shard.idx_bytes, shard.idx_xxh3, index.name),
    ]
    if shard.sentences:
        recorded.append((shard.sentences, shard.sentences_bytes, shard.sentences_xxh3, MANIFEST))
    if shard.origins:
        recorded.append((shard.origins, shard.origins_bytes, shard.origins_xxh3, MANIFEST))
    for path, size, digest, expected_by in recorded:
        remedy = _remedy(path, folder)
        if not path.is_file():
            raise DataError(f"{path} is missing; {remedy}")
        found = path.stat().st_size
        if found != size:
            fault = "truncated" if found < size else "longer than written"
            raise DataError(f"{path} is {found:,} bytes; {expected_by} expects {size:,} ({fault}); {remedy}")
        if checksum and (actual := file_xxh3(path)) != digest:
            raise DataError(f"{path} has checksum {actual}; it was written with {digest} (damaged); {remedy}")


def _remedy(path: Path, folder: Path) -> str:
    if path.parent == folder:
        return f"remove {folder} to prepare it again"
    return "copy it again from where it came"


def _tokenizer_dir(tokenizer: dict[str, Any], folder: Path) -> Path | None:
    return folder / tokenizer["tokenizer_folder"] if tokenizer["tokenizer_folder"] else None


def _vocab_size(config: RunConfig, manifest: dict[str, Any], shards: list[Shard]) -> int:
    vocab_size = model_vocab_size(config, manifest["vocab_size"], manifest["tokenizer"]["vocab_size"])
    for shard in shards:
        if shard.max_token_id >= vocab_size:
            raise DataError(
                f"{bin_path(shard.prefix)} holds token id {shard.max_token_id:,}; the vocabulary ends at "
                f"{vocab_size - 1:,}: it was made with another tokenizer; name that one in data.tokenizer, or set "
                "model.vocab_size"
            )
    return int(vocab_size)


def _weights(config: RunConfig, train: tuple[Shard, ...]) -> tuple[float, ...]:
    given = config.data.weights
    return normalised(given if given is not None else [shard.tokens for shard in train], len(train))


def _validation_weights(
    manifest: dict[str, Any], weights: tuple[float, ...], validation: tuple[Shard, ...]
) -> tuple[float, ...]:
    """Held-out documents are mixed as the training set is; separate validation sources by their size."""
    if manifest["separate_validation"]:
        return normalised([shard.tokens for shard in validation], len(validation))
    chosen = [weights[shard.source_index] for shard in validation]
    if sum(chosen) == 0:  # all weight lies on sources too small to hold out a document
        chosen = [1.0] * len(chosen)
    return normalised(chosen, len(chosen))


def _read_counts(folder: Path, train: int, validation: int) -> tuple[list[npt.NDArray[np.int64]], ...]:
    with np.load(folder / COUNTS) as counts:
        return (
            [counts[f"train_{i}"] for i in range(train)],
            [counts[f"validation_{i}"] for i in range(validation)],
        )


def validation_threshold(fraction: float) -> int:
    """A document whose 64-bit hash is below this is held out."""
    return min(int(fraction * 2**64), 2**64 - 1)


def documents_of_part(reader: IndexedReader, part: Part, fraction: float) -> npt.NDArray[np.int64]:
    """Numbers of the documents of a ready shard that belong to a part, by a stable hash of their number."""
    numbers = np.arange(reader.num_documents, dtype=np.int64)
    if part is Part.everything:
        return numbers
    held_out = mix64_array(numbers.astype(np.uint64)) < np.uint64(validation_threshold(fraction))
    return numbers[held_out if part is Part.validation else ~held_out]
