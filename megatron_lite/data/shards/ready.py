"""Existing Megatron shards: used in place, and read once to count their tokens."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.data.corpus.sources import Source
from megatron_lite.data.sampler import mix64_array
from megatron_lite.data.shards.indexed import IndexedReader, bin_path, idx_path
from megatron_lite.data.shards.prepared import Part, Shard, validation_threshold
from megatron_lite.data.shards.sentences import SentenceWriter, sentences_path
from megatron_lite.data.shards.tokenise import Counted, SourceSets, TokenisationJob, all_held_out
from megatron_lite.data.sidecar import read_sidecar
from megatron_lite.data.tokenizer.needs import no_sentences
from megatron_lite.errors import DataError
from megatron_lite.files import file_xxh3

CHUNK_TOKENS = 2**22  # tokens counted at a time: 8 bytes of memory per token
NO_TOKENIZER: dict[str, Any] = {
    "tokenizer_folder": None,
    "tokenizer_hash": None,
    "vocab_size": None,
    "eod_id": None,
    "special": {},
}
LARGEST_VOCABULARY = 2**24  # far above any in use: a file with a larger id does not contain token ids


def check_ready(job: TokenisationJob, source: Source, needs_sentences: bool) -> None:
    """Check everything about an existing pair that needs no reading of its tokens.

    Raises:
        DataError: it is damaged or empty, was made with another tokenizer, or lacks the sentence boundaries that the
            objective needs.
    """
    prefix = source.paths[0].resolve()
    reader = IndexedReader(prefix)
    if reader.num_tokens == 0:
        raise DataError(f"{source}: {bin_path(prefix)} holds no tokens; name shards with documents in them")
    _check_tokenizer(job, source, prefix)
    if needs_sentences and job.sentence_kinds is None and not _is_split(reader):
        raise no_sentences(str(source))


def hashes_of_documents(source: Source) -> npt.NDArray[np.uint64]:
    """The hashes that decide which documents of an existing pair are held out [documents]."""
    documents = IndexedReader(source.paths[0].resolve()).num_documents
    return mix64_array(np.arange(documents, dtype=np.uint64))


def scan_ready(job: TokenisationJob, source: Source, index: int, into: Part, held_out: float | None) -> SourceSets:
    """Count the tokens of an existing pair that has passed `check_ready`.

    Raises:
        DataError: an id is not a token id, or every document is held out.
    """
    prefix = source.paths[0].resolve()
    reader = IndexedReader(prefix)
    job.report(f"reading {source.name}: {reader.num_tokens:,} tokens")
    facts: dict[str, Any] = {
        "source": source.name,
        "source_index": index,
        "prefix": prefix,
        "bin_bytes": bin_path(prefix).stat().st_size,
        "idx_bytes": idx_path(prefix).stat().st_size,
        "bin_xxh3": file_xxh3(bin_path(prefix)),
        "idx_xxh3": file_xxh3(idx_path(prefix)),
    }
    hashes = hashes_of_documents(source)
    chosen = hashes < np.uint64(validation_threshold(held_out or 0.0))
    sentences = _SentenceFile(job, reader, f"{into}-{index}")
    kept_counts, chosen_counts = count_tokens(reader, chosen, sentences.add)
    facts |= sentences.finish()
    if kept_counts.sum() == 0:
        raise all_held_out(source, held_out)
    if not held_out:
        whole = _counted(reader, ~chosen, kept_counts, Part.everything, 0.0, facts)
        return SourceSets(whole, None, 2**64) if into is Part.train else SourceSets(None, whole, 2**64)
    train = _counted(reader, ~chosen, kept_counts, Part.train, held_out, facts)
    validation = _counted(reader, chosen, chosen_counts, Part.validation, held_out, facts)
    return SourceSets(train, validation if validation.shard.tokens else None, int(hashes.min()))


def shared_tokenizer(sources: list[Source]) -> tuple[Path | None, dict[str, Any]]:
    """The tokenizer folder beside shards that `prepare` made, and the facts about it in their sidecars.

    The folder is None if the shards were copied without it; all facts are None for shards that another tool made.

    Raises:
        DataError: two sources were made with different tokenizers.
    """
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for source in sources:
        sidecar = read_sidecar(source.paths[0])
        if sidecar:
            facts = {**{key: sidecar.get(key) for key in NO_TOKENIZER}, "tokenizer_folder": None}
            found[sidecar["tokenizer_hash"]] = (source.paths[0].parent / sidecar["tokenizer_folder"], facts)
    if len(found) > 1:
        folders = " and ".join(str(folder) for folder, _ in found.values())
        raise DataError(
            f"data.source names shards that different tokenizers made ({folders}); prepare them with one tokenizer"
        )
    for folder, facts in found.values():
        return (folder if folder.is_dir() else None), facts
    return None, NO_TOKENIZER


class _SentenceFile:
    """Records where sentences begin in an existing pair; written to the prepared folder, because the pair is not ours.

    If documents consist of several sequences, Megatron has split them into sentences, and those are used. Otherwise
    the sentences are found from the tokens; without a tokenizer nothing is written.
    """

    def __init__(self, job: TokenisationJob, reader: IndexedReader, name: str) -> None:
        self._is_split = _is_split(reader)
        self._writer: SentenceWriter | None = None
        if self._is_split or job.sentence_kinds is not None:
            self._writer = SentenceWriter(sentences_path(job.folder / name), job.sentence_kinds)
        if self._writer and self._is_split:
            self._writer.add_places(np.unique(reader.sequence_starts[reader.sequence_starts < reader.num_tokens]))

    def add(self, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> None:
        if self._writer and not self._is_split:
            self._writer.add(tokens, lengths)

    def finish(self) -> dict[str, Any]:
        """The fields of a `Shard`."""
        return self._writer.finish() if self._writer else {}


def _is_split(reader: IndexedReader) -> bool:
    return len(reader.sequence_starts) > reader.num_documents


def _check_tokenizer(job: TokenisationJob, source: Source, prefix: Path) -> None:
    sidecar = read_sidecar(prefix)
    if sidecar is None or job.tokenizer is None:
        return
    if sidecar["tokenizer_hash"] in (job.tokenizer.digest, *job.tokenizer.extends):
        return
    raise DataError(
        f"{source} was made with another tokenizer (hash {sidecar['tokenizer_hash'][:12]}) than "
        f"data.tokenizer={job.data.tokenizer} (hash {job.tokenizer.digest[:12]}); name the tokenizer of the shards in "
        "data.tokenizer"
    )


def count_tokens(
    reader: IndexedReader,
    chosen: npt.NDArray[np.bool_],
    visit: Callable[[npt.NDArray[Any], npt.NDArray[np.int64]], None],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """How often each token occurs in the documents that are not chosen, and in the chosen ones.

    Args:
        chosen: one flag per document [documents].
        visit: called with all documents in order, a batch at a time: their tokens, and the length of each.
    Raises:
        DataError: an id is negative, or larger than any vocabulary.
    """
    counts = [np.zeros(0, np.int64), np.zeros(0, np.int64)]
    ends = reader.document_starts + reader.document_lengths
    cuts = np.searchsorted(ends, np.arange(CHUNK_TOKENS, reader.num_tokens, CHUNK_TOKENS), side="left") + 1
    bounds = np.unique([0, *cuts.tolist(), reader.num_documents]).tolist()
    for first, last in pairwise(bounds):
        tokens = reader.tokens[reader.document_starts[first] : ends[last - 1]]
        if len(tokens) == 0:
            continue
        _check_ids(tokens, reader.prefix)
        visit(tokens, reader.document_lengths[first:last])
        flags = np.repeat(chosen[first:last], reader.document_lengths[first:last])
        counts = [_added(counts[i], np.bincount(tokens[flags == bool(i)])) for i in (0, 1)]
    return counts[0], counts[1]


def _check_ids(tokens: npt.NDArray[Any], prefix: Path) -> None:
    for extreme in (int(tokens.min()), int(tokens.max())):
        if not 0 <= extreme < LARGEST_VOCABULARY:
            raise DataError(f"{bin_path(prefix)} holds {extreme:,}, which cannot be a token id; name Megatron shards")


def _counted(
    reader: IndexedReader,
    chosen: npt.NDArray[np.bool_],
    counts: npt.NDArray[np.int64],
    part: Part,
    fraction: float,
    facts: dict[str, Any],
) -> Counted:
    shard = Shard(
        **facts,
        part=part,
        validation_fraction=fraction,
        documents=int(chosen.sum()),
        tokens=int(reader.document_lengths[chosen].sum()),
        max_token_id=len(counts) - 1,
    )
    return Counted(shard, counts)


def _added(total: npt.NDArray[np.int64], more: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
    longer = np.zeros(max(len(total), len(more)), np.int64)
    longer[: len(total)] += total
    longer[: len(more)] += more
    return longer
