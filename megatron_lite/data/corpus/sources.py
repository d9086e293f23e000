"""A source of documents, and the identity that decides whether a prepared copy of it is still right.

A source is one entry of `data.source`: the embedded corpus, a file (or a pattern of files of one kind), a Hugging Face
dataset, or ready Megatron shards. Each source gets its own shards, so that several can be blended by weight. Which one
a name means is told by `source_names`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_lite.config.schema import DataConfig
from megatron_lite.data.corpus.embedded import embedded_digest, embedded_names
from megatron_lite.data.sidecar import read_sidecar
from megatron_lite.errors import DataError, remedy_of

EMBEDDED = "embedded"
HALF = "Megatron's shards are a pair of .bin and .idx: copy both from where they came, or name another prefix"
SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")  # of what `save_to_disk` of `datasets` writes
FileIdentity = Callable[[Path], list[Any]]


class SourceKind(StrEnum):
    embedded = "embedded"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    dataset = "dataset"
    shards = "shards"


@dataclass(frozen=True)
class Source:
    """One entry of `data.source` or `data.validation_source`."""

    key: str
    """Where it stands in the configuration, for messages: `data.source` or `data.source[1]`."""
    name: str
    """As the user wrote it."""
    kind: SourceKind
    paths: tuple[Path, ...] = ()
    """Its files; for shards the one prefix without suffix; for a dataset its local folder, if it is one."""

    @property
    def is_text(self) -> bool:
        """True when documents must be tokenised; False for ready shards."""
        return self.kind is not SourceKind.shards

    @property
    def files(self) -> tuple[str, ...]:
        """Names of what its documents are read from, in that order: absolute paths, or the dataset of the hub."""
        if self.kind is SourceKind.embedded:
            return embedded_names()
        return tuple(str(path.absolute()) for path in self.paths) or (self.name,)

    def __str__(self) -> str:
        return f"{self.key}={self.name}"


def identity(source: Source, data: DataConfig, file_identity: FileIdentity) -> dict[str, Any]:
    """Everything about a source that decides its documents, and not how it is spelled or where it lies.

    Equal identities give equal shards. A dataset of the hub is identified by its name: the prepared copy pins what was
    downloaded first.

    Args:
        file_identity: of `digests`: what a file holds.
    Raises:
        DataError: a file cannot be read.
    """
    try:
        return _identity(source, data, file_identity)
    except OSError as error:
        remedy = remedy_of(error, "correct its permissions, or name another file")
        raise DataError(f"{source}: {error.filename} cannot be read: {error.strerror}; {remedy}") from None


def _identity(source: Source, data: DataConfig, file_identity: FileIdentity) -> dict[str, Any]:
    facts: dict[str, Any] = {"kind": str(source.kind)}
    if source.kind is SourceKind.embedded:
        facts["content"] = embedded_digest()
    elif source.kind is SourceKind.dataset:
        facts |= {"config": data.dataset_config, "split": data.dataset_split, "text_key": data.text_key}
        facts["longest"] = data.max_document_bytes
        facts["content"] = _folder_identity(source.paths[0], file_identity) if source.paths else source.name
    elif source.kind is SourceKind.shards:
        prefix = source.paths[0]
        sidecar = read_sidecar(prefix)
        facts["tokenizer"] = sidecar["tokenizer_hash"] if sidecar else None
        facts["content"] = [file_identity(_half(prefix, suffix, source)) for suffix in (".bin", ".idx")]
    else:
        facts["content"] = [file_identity(path) for path in source.paths]
        facts |= {"longest": data.max_document_bytes}
        facts |= {"separator": data.document_separator} if source.kind is SourceKind.text else {"key": data.text_key}
    return facts


def _half(prefix: Path, suffix: str, source: Source) -> Path:
    path = prefix.with_name(prefix.name + suffix)
    if not path.is_file():
        raise DataError(f"{source}: {path} does not exist; {HALF}")
    return path


def _folder_identity(folder: Path, file_identity: FileIdentity) -> list[Any]:
    return [[str(path.relative_to(folder)), *file_identity(path)] for path in sorted(visible_files(folder))]


def visible_files(folder: Path) -> Iterator[Path]:
    """The files of a folder and of those in it, but for hidden ones.

    Raises:
        DataError: a link leads nowhere, or to a folder, which neither `datasets` nor this follows.
    """
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_symlink() and not path.exists():
            raise dangling(path)
        if path.is_symlink() and path.is_dir():
            raise DataError(
                f"{path} is a link to the folder {os.readlink(path)}, and links within the folder of a source are not "
                "followed; name that folder as a source of its own, and remove the link"
            )
        if path.is_file():
            yield path


def dangling(path: Path) -> DataError:
    return DataError(f"{path} is a link to {os.readlink(path)}, which does not exist; correct the link, or remove it")
