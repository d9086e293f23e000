"""What `data.source` can name, and the identity that decides whether a prepared copy is still right.

A source is one entry of `data.source`: the embedded corpus, a file (or a pattern of files of one kind), a Hugging Face
dataset, or ready Megatron shards. Each source gets its own shards, so that several can be blended by weight.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from megatron_lite.config.schema import DataConfig
from megatron_lite.data.embedded import embedded_digest, embedded_names
from megatron_lite.data.sidecar import read_sidecar
from megatron_lite.errors import ConfigError, DataError

EMBEDDED = "embedded"
FORMS = "use embedded, a .txt, .jsonl[.gz] or .parquet file, a Megatron .bin/.idx prefix, or a Hugging Face dataset"
FileIdentity = Callable[[Path], list[Any]]


class SourceKind(StrEnum):
    embedded = "embedded"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    dataset = "dataset"
    shards = "shards"


SUFFIXES = {
    ".txt": SourceKind.text,
    ".txt.gz": SourceKind.text,
    ".jsonl": SourceKind.jsonl,
    ".jsonl.gz": SourceKind.jsonl,
    ".parquet": SourceKind.parquet,
}


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


def source_names(value: Any) -> list[str]:
    """The entries of a `source` setting, which may be one string or a list of them."""
    if value is None:
        return []
    return [str(value)] if isinstance(value, str | os.PathLike) else [str(entry) for entry in value]


def resolve_sources(value: Any, key: str) -> list[Source]:
    """The sources behind `data.source` or `data.validation_source`.

    Raises:
        DataError: a named file does not exist, or is of no known form.
        ConfigError: the list is empty.
    """
    names = source_names(value)
    if not names and value is not None:
        raise ConfigError(f"{key}=[] names no source; {FORMS}")
    keys = [key] if isinstance(value, str) else [f"{key}[{i}]" for i in range(len(names))]
    return [resolve_source(name, entry_key) for name, entry_key in zip(names, keys, strict=True)]


def resolve_source(name: str, key: str) -> Source:
    if name == EMBEDDED:
        return Source(key, name, SourceKind.embedded)
    path = Path(name).expanduser()
    if prefix := shard_prefix(path):
        return Source(key, name, SourceKind.shards, (prefix,))
    kind = _kind_by_suffix(name)
    if kind is None:
        return _dataset(name, key, path)
    paths = sorted(map(Path, glob.glob(str(path)))) if glob.has_magic(name) and not path.exists() else [path]
    if not paths:
        raise DataError(f"{key}={name} matches no file (looked from {Path.cwd()}); correct the pattern")
    if missing := [p for p in paths if not p.is_file()]:
        raise DataError(f"{key}={name}: {missing[0]} is not a file (looked from {Path.cwd()}); correct the path")
    return Source(key, name, kind, tuple(paths))


def _kind_by_suffix(name: str) -> SourceKind | None:
    return next((kind for suffix, kind in SUFFIXES.items() if name.lower().endswith(suffix)), None)


def shard_prefix(path: Path) -> Path | None:
    """`corpus` of corpus.bin and corpus.idx, whichever of the three was named."""
    if path.suffix in (".bin", ".idx"):
        return path.with_suffix("")
    has_half = any(path.with_name(path.name + suffix).is_file() for suffix in (".bin", ".idx"))
    return path if has_half and not path.exists() else None


def _dataset(name: str, key: str, path: Path) -> Source:
    if path.is_file():
        raise DataError(f"{key}={name} is a file of no known form; {FORMS}")
    if path.is_dir():
        return Source(key, name, SourceKind.dataset, (path,))
    if name.count("/") > 1 or name.startswith((".", "~", "/")):  # cannot be a name of the hub
        raise DataError(f"{key}={name} does not exist (looked from {Path.cwd()}); {FORMS}")
    return Source(key, name, SourceKind.dataset)


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
        raise DataError(f"{source}: {error.filename} cannot be read: {error.strerror}") from None


def _identity(source: Source, data: DataConfig, file_identity: FileIdentity) -> dict[str, Any]:
    facts: dict[str, Any] = {"kind": str(source.kind)}
    if source.kind is SourceKind.embedded:
        facts["content"] = embedded_digest()
    elif source.kind is SourceKind.dataset:
        facts |= {"config": data.dataset_config, "split": data.dataset_split, "text_key": data.text_key}
        facts["content"] = _folder_identity(source.paths[0], file_identity) if source.paths else source.name
    elif source.kind is SourceKind.shards:
        prefix = source.paths[0]
        sidecar = read_sidecar(prefix)
        facts["tokenizer"] = sidecar["tokenizer_hash"] if sidecar else None
        facts["content"] = [file_identity(_half(prefix, suffix, source)) for suffix in (".bin", ".idx")]
    else:
        facts["content"] = [file_identity(path) for path in source.paths]
        facts |= {"separator": data.document_separator} if source.kind is SourceKind.text else {"key": data.text_key}
    return facts


def _half(prefix: Path, suffix: str, source: Source) -> Path:
    path = prefix.with_name(prefix.name + suffix)
    if not path.is_file():
        raise DataError(f"{source}: {path} does not exist; Megatron shards are a pair of .bin and .idx")
    return path


def _folder_identity(folder: Path, file_identity: FileIdentity) -> list[Any]:
    return [[str(path.relative_to(folder)), *file_identity(path)] for path in sorted(_visible_files(folder))]


def _visible_files(folder: Path) -> Iterator[Path]:
    paths: Iterable[Path] = folder.rglob("*")
    return (p for p in paths if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts))
