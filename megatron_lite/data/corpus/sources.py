"""A source of documents, and the identity that decides whether its prepared copy is up to date.

A source is one entry of `data.source`: the embedded corpus, a file (or a pattern of files of one format), a Hugging
Face dataset, or existing Megatron shards. Each source gets its own shards, so that several can be blended by weight.
`source_names` resolves names to sources.
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
HALF = "Megatron shards are a pair of .bin and .idx files: copy both again from the original, or name another prefix"
SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")  # written by `save_to_disk` of `datasets`
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
    """Its configuration key, for messages: `data.source` or `data.source[1]`."""
    name: str
    """As the user wrote it."""
    kind: SourceKind
    paths: tuple[Path, ...] = ()
    """Its files; for shards, the prefix without suffix; for a dataset, its local folder (empty for one on the hub)."""

    @property
    def is_text(self) -> bool:
        """True when documents must be tokenised; False for ready shards."""
        return self.kind is not SourceKind.shards

    @property
    def files(self) -> tuple[str, ...]:
        """Where its documents are read from, in order: absolute paths, or the name of the hub dataset."""
        if self.kind is SourceKind.embedded:
            return embedded_names()
        return tuple(str(path.absolute()) for path in self.paths) or (self.name,)

    def __str__(self) -> str:
        return f"{self.key}={self.name}"


def identity(source: Source, data: DataConfig, file_identity: FileIdentity) -> dict[str, Any]:
    """Everything that determines the documents of a source, but not its spelling or location.

    Equal identities give equal shards. A hub dataset is identified by its name: the prepared copy pins the first
    download.

    Args:
        file_identity: from `digests`; identifies the content of a file.
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
    """All files of a folder and its subfolders, except hidden ones.

    Raises:
        DataError: a link is dangling, or leads to a folder (neither `datasets` nor this function follows those).
    """
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.is_symlink() and not path.exists():
            raise dangling(path)
        if path.is_symlink() and path.is_dir():
            raise DataError(
                f"{path} is a link to the folder {os.readlink(path)}, and links within the folder of a source are not "
                "followed; name that folder as a separate source, and remove the link"
            )
        if path.is_file():
            yield path


def dangling(path: Path) -> DataError:
    return DataError(f"{path} is a link to {os.readlink(path)}, which does not exist; correct the link, or remove it")
