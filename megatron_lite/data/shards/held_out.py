"""Whether each source keeps documents to train on, and some are held out for validation: checked before tokenising."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_lite.config.schema import DataConfig
from megatron_lite.data.corpus.readers import read_documents
from megatron_lite.data.corpus.sources import Source, SourceKind
from megatron_lite.data.shards.prepared import validation_threshold
from megatron_lite.data.shards.ready import hashes_of_documents
from megatron_lite.data.shards.tokenise import all_held_out, document_hash
from megatron_lite.errors import DataError


def check_held_out(sources: list[Source], data: DataConfig) -> None:
    """Check that each source keeps a document and that at least one is held out; reads no more than it needs.

    Raises:
        DataError: one of these conditions fails; says how to fix it.
    """
    threshold = validation_threshold(data.validation_fraction)
    documents, lowest, is_held_out = 0, 2**64, False
    for source in sources:
        before, is_kept = documents, False
        for number in _document_hashes(source, data):
            documents, lowest = documents + 1, min(lowest, number)
            is_held_out, is_kept = is_held_out or number < threshold, is_kept or number >= threshold
            if is_kept and is_held_out:
                break
        if not is_kept and documents > max(before, 1):
            raise all_held_out(source, data.validation_fraction)
    if documents == 1:
        raise _one_document(sources)
    if documents and not is_held_out:
        raise nothing_held_out(data, documents, lowest)


def _document_hashes(source: Source, data: DataConfig) -> Iterator[int]:
    """The hashes that decide to which set each document of a source belongs."""
    if source.is_text:
        return (document_hash(document.text) for document in read_documents(source, data))
    return iter(hashes_of_documents(source).tolist())


def _one_document(sources: list[Source]) -> DataError:
    is_split = any(source.kind is SourceKind.text for source in sources)  # only these have a separator
    remedy = "set data.document_separator to what is between its documents, or " if is_split else ""
    return DataError(
        f"data.source has 1 document, but holding out a validation set takes 2 or more; {remedy}set "
        "data.validation_source"
    )


def nothing_held_out(data: DataConfig, documents: int, lowest_hash: int) -> DataError:
    enough = np.ceil(lowest_hash / 2**64 * 1000) / 1000 + 0.001
    remedy = (
        f"use {enough:.3f} or more, or name a data.validation_source"
        if enough < 1
        else ("name a data.validation_source")
    )
    return DataError(
        f"data.validation_fraction={data.validation_fraction} holds out none of the {documents} documents; {remedy}"
    )
