"""Tokenise one text source into its shards, in batches that go straight to the files.

At most a few batches are in memory, whatever the size of the corpus.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_lite.config.schema import DataConfig
from megatron_lite.data.corpus.hugging_face import as_files
from megatron_lite.data.corpus.readers import read_documents
from megatron_lite.data.corpus.rows import Document, RowCounts, no_documents
from megatron_lite.data.corpus.sources import Source
from megatron_lite.data.progress_lines import ProgressLines
from megatron_lite.data.shards.indexed import IndexedWriter, token_dtype
from megatron_lite.data.shards.origins import ORIGIN_DTYPE, origins_writer
from megatron_lite.data.shards.prepared import Part, Shard, validation_threshold
from megatron_lite.data.shards.sentences import Kinds, SentenceWriter, sentences_path
from megatron_lite.data.sidecar import write_sidecar
from megatron_lite.data.tokenizer.tokenizer import Tokenizer
from megatron_lite.errors import DataError
from megatron_lite.files import size_text

BATCH_CHARACTERS = 2**20
BATCHES_IN_FLIGHT = 3  # the next ones are encoded while one is written
TRAINING_TEXT_CHARACTERS = 256 * 2**20  # more hardly changes the vocabulary, and training keeps all words in memory


@dataclass(frozen=True)
class TokenisationJob:
    """Settings and results shared by all sources of one preparation."""

    data: DataConfig
    folder: Path
    tokenizer: Tokenizer | None
    """None for existing shards that came without a tokenizer."""
    tokenizer_facts: dict[str, Any]
    """Facts for manifest and sidecars: tokenizer_folder, tokenizer_hash, vocab_size, eod_id, special."""
    sentence_kinds: Kinds | None
    """The flags of its tokens that decide where sentences begin, see `sentences`."""
    report: Callable[[str], None]


@dataclass(frozen=True)
class Counted:
    """A shard, and how often each token occurs in it [largest id + 1]."""

    shard: Shard
    counts: npt.NDArray[np.int64]


@dataclass(frozen=True)
class SourceSets:
    """The shards of one source for the training and the validation set."""

    train: Counted | None
    validation: Counted | None
    lowest_hash: int
    """Smallest hash of its documents: the first document that a larger validation_fraction would hold out."""
    rows: RowCounts | None = None
    """Row counts of a text source."""


def training_texts(sources: Iterable[Source], data: DataConfig, held_out: float | None) -> Iterator[str]:
    """The first training documents of each source: equal shares of a total of 256 Mi characters."""
    sources = list(sources)
    threshold = validation_threshold(held_out) if held_out else 0
    for source in sources:
        left = TRAINING_TEXT_CHARACTERS // len(sources)
        for text, _, _ in read_documents(source, data):
            if document_hash(text) >= threshold:
                yield text
                left -= len(text)
            if left <= 0:
                break


def document_hash(text: str) -> int:
    """A hash of the text itself, so that equal documents go to the same set, whatever their order or file."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8"))


def tokenise_source(job: TokenisationJob, source: Source, index: int, into: Part, held_out: float | None) -> SourceSets:
    """Tokenise all documents of a source, and append an end-of-document token to each.

    Args:
        into: the set that gets the documents.
        held_out: fraction of the documents that go to the validation set instead.
    Raises:
        DataError: the source is unreadable, has no documents, or all of them are held out.
    """
    assert job.tokenizer is not None
    source, data = as_files(source, job.data)
    threshold = validation_threshold(held_out) if held_out else 0
    outputs = {into: _Output(job, source, index, into)}
    if held_out:
        outputs[Part.validation] = _Output(job, source, index, Part.validation)
    lowest = 2**64
    amount = _Amount(source.name)
    rows = RowCounts(source.name)
    with ProgressLines(job.report, amount.line):
        read = read_documents(source, data, rows, amount.read)
        for documents, (tokens, lengths) in _encoded_batches(job.tokenizer, read):
            hashes = np.fromiter((document_hash(text) for text, _, _ in documents), np.uint64, len(documents))
            origins = np.array([(file, number) for _, file, number in documents], ORIGIN_DTYPE)
            lowest = min(lowest, int(hashes.min()))
            chosen = hashes < np.uint64(threshold)
            outputs[into].add(tokens, lengths, origins, ~chosen)
            if held_out:
                outputs[Part.validation].add(tokens, lengths, origins, chosen)
            amount.characters += sum(len(text) for text, _, _ in documents)
            amount.tokens += len(tokens)
    if outputs[into].documents == 0:
        if lowest == 2**64:
            raise no_documents(rows, source)
        raise all_held_out(source, held_out)
    done = {part: output.finish() for part, output in outputs.items()}
    return SourceSets(done.get(Part.train), done.get(Part.validation), lowest, rows)


def all_held_out(source: Source, fraction: float | None) -> DataError:
    return DataError(
        f"data.validation_fraction={fraction} holds out every document of {source}; use a smaller fraction, or name a "
        "data.validation_source"
    )


class _Output:
    """Writes one pair of files with its token counts and its sidecar."""

    def __init__(self, job: TokenisationJob, source: Source, index: int, part: Part) -> None:
        assert job.tokenizer is not None
        self._job = job
        self._source = source
        self._index = index
        self._prefix = job.folder / f"{part}-{index}"
        self._vocab_size = job.tokenizer.vocab_size
        self._writer = IndexedWriter(self._prefix, token_dtype(self._vocab_size))
        self._sentences = SentenceWriter(sentences_path(self._prefix), job.sentence_kinds)
        self._origins = origins_writer(self._prefix)
        self._counts = np.zeros(self._vocab_size, np.int64)
        self.documents = 0

    def add(
        self,
        tokens: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int64],
        origins: npt.NDArray[np.void],
        chosen: npt.NDArray[np.bool_],
    ) -> None:
        """Write the chosen documents of a batch: tokens [sum(lengths)], the other arrays [documents]."""
        if not chosen.any():
            return
        if not chosen.all():
            tokens, lengths, origins = tokens[np.repeat(chosen, lengths)], lengths[chosen], origins[chosen]
        self._writer.add(tokens, lengths)
        self._sentences.add(tokens, lengths)
        self._origins.add(origins)
        self._counts += np.bincount(tokens, minlength=self._vocab_size)
        self.documents += len(lengths)

    def finish(self) -> Counted | None:
        """Close the files; if there were no documents, delete them and return None."""
        facts = self._writer.finish()
        beside = self._sentences.finish() | self._origins.finish("origins")
        if self.documents == 0:
            self._writer.remove()
            self._sentences.path.unlink()
            self._origins.path.unlink()
            return None
        write_sidecar(self._prefix, {"source": self._source.name, **self._job.tokenizer_facts, **asdict(facts)})
        shard = Shard(
            source=self._source.name,
            source_index=self._index,
            prefix=self._prefix,
            part=Part.everything,
            validation_fraction=0.0,
            documents=facts.documents,
            tokens=facts.tokens,
            max_token_id=int(np.flatnonzero(self._counts)[-1]),
            bin_bytes=facts.bin_bytes,
            idx_bytes=facts.idx_bytes,
            bin_xxh3=facts.bin_xxh3,
            idx_xxh3=facts.idx_xxh3,
            files=self._source.files,
            **beside,
        )
        return Counted(shard, self._counts)


Encoded = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]


def _encoded_batches(tokenizer: Tokenizer, documents: Iterator[Document]) -> Iterator[tuple[list[Document], Encoded]]:
    """Batches of documents with their tokens, in order; a few are encoded ahead."""

    def encoded(batch: list[Document]) -> Encoded:
        return tokenizer.encode_documents([text for text, _, _ in batch])

    batches = batched_by_size(documents, BATCH_CHARACTERS)
    with ThreadPoolExecutor(max_workers=BATCHES_IN_FLIGHT - 1) as pool:
        waiting: deque[tuple[list[Document], Future[Encoded]]] = deque()
        try:
            while True:
                for batch in islice(batches, BATCHES_IN_FLIGHT - len(waiting)):
                    waiting.append((batch, pool.submit(encoded, batch)))
                if not waiting:
                    return
                batch, result = waiting.popleft()
                yield batch, result.result()
        finally:
            for _, result in waiting:
                result.cancel()


def batched_by_size(documents: Iterator[Document], size: int) -> Iterator[list[Document]]:
    """Group documents until a batch has `size` characters."""
    batch: list[Document] = []
    total = 0
    for document in documents:
        batch.append(document)
        total += len(document.text)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


@dataclass
class _Amount:
    """Progress of tokenising a source."""

    source: str
    characters: int = 0
    tokens: int = 0
    bytes: int = 0

    def read(self, count: int) -> None:
        """Count bytes read, as a sign of progress even if many rows have no document."""
        self.bytes += count

    def line(self, seconds: float, is_done: bool) -> str:
        million = self.characters / 1e6
        return (
            f"{'tokenised' if is_done else 'tokenising'} {self.source}: {size_text(self.bytes)} read, {million:.1f} M "
            f"characters, {self.tokens:,} tokens, {million / seconds:.1f} M/s"
        )
