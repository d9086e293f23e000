"""Describe prepared data in lines of text, for `python -m megatron_lite.data inspect`."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lite.data.shards.indexed import IndexedReader, bin_path, idx_path
from megatron_lite.data.shards.prepared import MANIFEST, Shard, check_files, check_shard, read_manifest, shards_of
from megatron_lite.data.shards.sentences import SENTENCE_DTYPE
from megatron_lite.data.sidecar import read_sidecar
from megatron_lite.data.tokenizer.tokenizer import Tokenizer, open_tokenizer
from megatron_lite.errors import DataError
from megatron_lite.files import file_xxh3

SHOWN_TOKENS = 60


def describe_folder(folder: Path, *, verify: bool, documents: int) -> list[str]:
    """Describe a prepared folder: its tokenizer, its shards, and the beginning of some documents.

    Args:
        verify: read every file and compare its checksum.
        documents: how many documents of each shard to show.
    Raises:
        DataError: a file is missing or damaged.
    """
    manifest = read_manifest(folder)
    check_files(manifest, folder)
    tokenizer = _tokenizer_of(manifest["tokenizer"], folder)
    lines = [f"{folder / MANIFEST}: fingerprint {manifest['fingerprint']}", _tokenizer_line(manifest["tokenizer"])]
    for name in ("train", "validation"):
        for shard in shards_of(manifest, name, folder):
            check_shard(shard, folder, largest_read=inf if verify else 0)
            lines.append(_shard_line(name, shard) + (", checksums match" if verify else ""))
            lines += _document_lines(shard.prefix, documents, tokenizer)
    return lines


def describe_pair(prefix: Path, *, verify: bool, documents: int) -> list[str]:
    """Describe a .bin/.idx pair of any origin.

    Raises:
        DataError: the pair is damaged, or differs from its sidecar.
    """
    reader = IndexedReader(prefix)
    sidecar = read_sidecar(prefix)
    largest = f", ids up to {int(np.max(reader.tokens)):,}" if reader.num_tokens else ""
    lines = [f"{prefix}: {reader.num_documents:,} documents, {reader.num_tokens:,} tokens, {reader.dtype}{largest}"]
    if sidecar is None:
        lines.append("no sidecar: made by another tool, its tokenizer is unknown" + (", no checksum" if verify else ""))
        return lines + _document_lines(prefix, documents, None)
    if verify:
        _verify_pair(prefix, sidecar)
        lines.append("checksums match")
    lines.append(_tokenizer_line(sidecar))
    return lines + _document_lines(prefix, documents, _tokenizer_of(sidecar, prefix.parent))


def _verify_pair(prefix: Path, sidecar: dict[str, Any]) -> None:
    is_prepared = (prefix.parent / MANIFEST).is_file()
    remedy = f"remove {prefix.parent} to prepare it again" if is_prepared else "copy it again from the original"
    for path, key in ((bin_path(prefix), "bin_xxh3"), (idx_path(prefix), "idx_xxh3")):
        actual, written = file_xxh3(path), sidecar.get(key)
        if actual != written:
            raise DataError(f"{path} has checksum {actual}; it was written with {written} (damaged); {remedy}")


def _tokenizer_of(facts: dict[str, Any], folder: Path) -> Tokenizer | None:
    name = facts["tokenizer_folder"]
    return open_tokenizer(str(folder / name)) if name and (folder / name).is_dir() else None


def _tokenizer_line(facts: dict[str, Any]) -> str:
    digest, eod_id = facts["tokenizer_hash"], facts["eod_id"]
    if digest is None:
        return "tokenizer: unknown"
    return f"tokenizer: {facts['vocab_size']:,} tokens, end of document {eod_id}, hash {digest}"


def _shard_line(name: str, shard: Shard) -> str:
    part = "" if shard.part == "everything" else f" ({shard.part} part)"
    counts = f"{shard.documents:,} documents, {shard.tokens:,} tokens"
    if shard.sentences:
        counts += f", {shard.sentences_bytes // SENTENCE_DTYPE.itemsize:,} sentences in the file"
    return f"{name}: {shard.prefix}{part} from {shard.source}: {counts}"


def _document_lines(prefix: Path, count: int, tokenizer: Tokenizer | None) -> list[str]:
    if count == 0:
        return []
    reader = IndexedReader(prefix)
    return [_document_line(reader, i, tokenizer) for i in range(min(count, reader.num_documents))]


def _document_line(reader: IndexedReader, index: int, tokenizer: Tokenizer | None) -> str:
    ids = reader.document(index)
    shown = ids[:SHOWN_TOKENS].tolist()
    return f"  document {index}, {len(ids):,} tokens: {repr(tokenizer.decode(shown)) if tokenizer else shown}"
