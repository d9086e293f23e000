"""Ready Megatron shards: used where they lie, read through once to learn what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.data.indexed import IndexedReader, bin_path, file_xxh3, idx_path
from megatron_lite.data.prepared import Part, Shard, documents_of_part
from megatron_lite.data.sampler import mix64_array
from megatron_lite.data.sidecar import read_sidecar
from megatron_lite.data.sources import Source
from megatron_lite.data.tokenise import Counted, Job, SourceSets, all_held_out
from megatron_lite.errors import DataError

CHUNK_TOKENS = 2**23
LARGEST_VOCABULARY = 2**24  # far above any in use: an id beyond it means that the file holds no token ids


def scan_ready(job: Job, source: Source, index: int, into: Part, held_out: float | None) -> SourceSets:
    """Check a ready pair against the tokenizer and count its tokens, in one pass.

    Raises:
        DataError: the pair is damaged or empty, or was made with another tokenizer.
    """
    prefix = source.paths[0].resolve()
    reader = IndexedReader(prefix)
    if reader.num_tokens == 0:
        raise DataError(f"{source}: {bin_path(prefix)} holds no tokens; name shards with documents in them")
    _check_tokenizer(job, source, prefix)
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
    if not held_out:
        whole = _count(job, reader, Part.everything, 0.0, facts)
        is_train = into is Part.train
        return SourceSets(whole if is_train else None, None if is_train else whole, lowest_hash=2**64)
    hashes = mix64_array(np.arange(reader.num_documents, dtype=np.uint64))
    train = _count(job, reader, Part.train, held_out, facts)
    if train is None:
        raise all_held_out(source, held_out)
    return SourceSets(train, _count(job, reader, Part.validation, held_out, facts), int(hashes.min()))


def shared_tokenizer(sources: list[Source]) -> Path | None:
    """The tokenizer folder that lies beside shards of our own making; None for shards from elsewhere.

    Raises:
        DataError: two sources were made with different tokenizers.
    """
    found: dict[str, Path] = {}
    for source in sources:
        sidecar = read_sidecar(source.paths[0])
        if sidecar:
            found[sidecar["tokenizer_hash"]] = source.paths[0].parent / sidecar["tokenizer_folder"]
    if len(found) > 1:
        folders = " and ".join(map(str, found.values()))
        raise DataError(
            f"data.source names shards of different tokenizers ({folders}); prepare them with one tokenizer"
        )
    folder = next(iter(found.values()), None)
    return folder if folder is not None and folder.is_dir() else None


def _check_tokenizer(job: Job, source: Source, prefix: Path) -> None:
    sidecar = read_sidecar(prefix)
    if sidecar is None or job.tokenizer is None or sidecar["tokenizer_hash"] == job.tokenizer.digest:
        return
    raise DataError(
        f"{source} was made with another tokenizer (hash {sidecar['tokenizer_hash'][:12]}) than "
        f"data.tokenizer={job.data.tokenizer} (hash {job.tokenizer.digest[:12]}); name the tokenizer of the shards in "
        "data.tokenizer"
    )


def _count(job: Job, reader: IndexedReader, part: Part, fraction: float, facts: dict[str, Any]) -> Counted | None:
    """Tokens of the documents of one part, None where it has none."""
    documents = documents_of_part(reader, part, fraction)
    lengths = reader.document_lengths[documents]
    if int(lengths.sum()) == 0:
        return None
    counts = np.zeros(0, np.int64)
    for tokens in _chunks(reader, documents):
        if tokens.min() < 0 or tokens.max() >= LARGEST_VOCABULARY:
            wrong = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
            raise DataError(f"{bin_path(reader.prefix)} holds the token id {wrong:,}; it is no file of token ids")
        counts = _added(counts, np.bincount(tokens))
    shard = Shard(
        **facts,
        part=part,
        validation_fraction=fraction,
        documents=len(documents),
        tokens=int(lengths.sum()),
        max_token_id=len(counts) - 1,
    )
    return Counted(shard, counts)


def _chunks(reader: IndexedReader, documents: npt.NDArray[np.int64]) -> Any:
    """Tokens of the documents, many at a time: documents that follow each other are read together."""
    starts = reader.document_starts[documents]
    ends = starts + reader.document_lengths[documents]
    first_of_run = np.flatnonzero(np.concatenate([[True], starts[1:] != ends[:-1]]))
    last_of_run = np.concatenate([first_of_run[1:] - 1, [len(starts) - 1]])
    for start, end in zip(starts[first_of_run].tolist(), ends[last_of_run].tolist(), strict=True):
        for begin in range(start, end, CHUNK_TOKENS):
            yield reader.tokens[begin : min(begin + CHUNK_TOKENS, end)]


def _added(total: npt.NDArray[np.int64], more: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
    longer = np.zeros(max(len(total), len(more)), np.int64)
    longer[: len(total)] += total
    longer[: len(more)] += more
    return longer
