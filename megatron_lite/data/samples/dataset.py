"""Random access to samples: any sample of any epoch is computed from its number, without an index on disk.

In one epoch of a source, its documents are shuffled by (seed, epoch), concatenated, and cut into windows of
window_tokens tokens that start every stride_tokens tokens. The windows are shuffled by (seed, epoch), too. A tail
shorter than a window is dropped in that epoch. Epochs follow each other without end.

A source of a blend may be shorter than one window. Its documents are then repeated until they fill one, so that an
"epoch" of one sample takes several passes over them. Its share of the samples is still its share of the tokens.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_lite.data.blend import Blend
from megatron_lite.data.sampler import Permutation, shuffled_order, stream_key
from megatron_lite.data.samples.sample_types import Text
from megatron_lite.data.shards.indexed import IndexedReader, bin_path
from megatron_lite.data.shards.prepared import Shard, documents_of_part
from megatron_lite.data.shards.sentences import read_sentences
from megatron_lite.errors import DataError

EPOCHS_IN_MEMORY = 2  # neighbouring samples at the end of an epoch need both

Sample = TypeVar("Sample")
Sample_co = TypeVar("Sample_co", covariant=True)


class Stretch(NamedTuple):
    """Consecutive tokens of one document that are part of a sample."""

    shard: Shard
    document: int
    """Its number in the pair of files."""
    first_token: int
    """Position of the first token in the document."""
    tokens: int
    """At least 1."""
    place: int
    """Position of the first token in the stored sample; the second part of a pair follows the first."""


class SampleDataset(Protocol[Sample_co]):
    """A dataset with random access by sample number, without end."""

    def sample(self, index: int) -> Sample_co:
        """The index-th sample; index may be any number >= 0."""
        ...

    def stretches(self, index: int) -> list[Stretch]:
        """The parts of documents that make up the index-th sample, in order."""
        ...

    def samples_in(self, epochs: int) -> int:
        """Number of samples before the first one that needs pass `epochs + 1` over a source."""
        ...


class WindowDataset:
    """Windows of one shard.

    Args:
        window_tokens: length of a sample.
        stride_tokens: distance between the starts of neighbouring samples.
        seed: decides the order, together with the source's number, so that sources differ.
        sentences: also return where sentences begin. The shard must have sentence boundaries.
        repeat: if the documents are shorter than a window, fill it with several passes over them.
    Raises:
        DataError: the files are damaged.
    """

    def __init__(
        self,
        shard: Shard,
        window_tokens: int,
        stride_tokens: int,
        seed: int,
        sentences: bool = False,
        repeat: bool = False,
    ) -> None:
        self.shard = shard
        self._window = window_tokens
        self._stride = stride_tokens
        self._reader = IndexedReader(shard.prefix)
        self._documents = documents_of_part(self._reader, shard.part, shard.validation_fraction)
        self._key = stream_key(seed, shard.source_index)
        self._sentences: npt.NDArray[np.int64] | None = None
        if sentences:
            assert shard.sentences is not None
            self._sentences = read_sentences(shard.sentences, shard.sentences_bytes)
        self.num_tokens = int(self._reader.document_lengths[self._documents].sum())
        self.samples_per_epoch = windows_in(self.num_tokens, window_tokens, stride_tokens)
        """0 if the shard is shorter than a window and is not repeated."""
        self.passes_per_epoch = 1
        if repeat and 0 < self.num_tokens < window_tokens:
            self._documents = self._documents[self._reader.document_lengths[self._documents] > 0]
            self.passes_per_epoch = -(-window_tokens // self.num_tokens)
            self.samples_per_epoch = 1
        self._epoch = lru_cache(maxsize=EPOCHS_IN_MEMORY)(self._build_epoch)

    def sample(self, index: int) -> Text:
        """A window [window_tokens]; with `sentences`, also the positions where sentences begin."""
        tokens, starts = self._reader.tokens, self._reader.document_starts
        out = np.empty(self._window, np.int64)
        sentences = None if self._sentences is None else [np.zeros(1, np.int64)]
        for _, document, first_token, taken, place in self.stretches(index):
            begin = int(starts[document]) + first_token
            out[place : place + taken] = tokens[begin : begin + taken]
            if sentences is not None:
                sentences.append(self._sentences_in(begin, begin + taken) + (place - begin))
        checked_ids(out, self.shard)
        if sentences is None:
            return Text(out)
        found = np.concatenate(sentences)
        found = found[1:] if len(found) > 1 and found[1] == 0 else found
        if not 0 <= found[0] <= found[-1] < len(out) or np.any(np.diff(found) < 1):
            raise damaged_sentences(self.shard)
        return Text(out, found)

    def stretches(self, index: int) -> list[Stretch]:
        epoch, place = divmod(index, self.samples_per_epoch)
        documents, ends, order = self._epoch(epoch)
        position = order(place) * self._stride  # in the token stream of this epoch
        at = int(ends.searchsorted(position, side="right"))
        found: list[Stretch] = []
        filled, wanted = 0, self._window
        while filled < wanted:
            document, left = int(documents[at]), int(ends[at]) - position
            taken = min(left, wanted - filled)
            if taken:  # a document may be empty
                first_token = int(self._reader.document_lengths[document]) - left
                found.append(Stretch(self.shard, document, first_token, taken, filled))
            filled += taken
            position += taken
            at += 1
        return found

    def samples_in(self, epochs: int) -> int:
        return epochs // self.passes_per_epoch * self.samples_per_epoch

    def _sentences_in(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Positions of sentence starts in the .bin file, in [begin, end)."""
        assert self._sentences is not None
        first, last = self._sentences.searchsorted([begin, end])
        return self._sentences[first:last]

    def _build_epoch(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Permutation]:
        """The order of documents, the end of each in the epoch's token stream [documents], and the order of windows."""
        documents = self._documents[shuffled_order(len(self._documents), self._key, epoch)]
        if self.passes_per_epoch > 1:
            documents = np.tile(documents, self.passes_per_epoch)
        ends = np.cumsum(self._reader.document_lengths[documents])
        return documents, ends, Permutation(self.samples_per_epoch, self._key, epoch, 1)


class BlendedDataset(Generic[Sample]):
    """Samples of several sources, mixed by positive weights."""

    def __init__(self, datasets: Sequence[SampleDataset[Sample]], weights: Sequence[Fraction], seed: int) -> None:
        self.datasets = datasets
        self._blend = Blend(weights, seed)

    def sample(self, index: int) -> Sample:
        source, inner = self._blend(index)
        return self.datasets[source].sample(inner)

    def stretches(self, index: int) -> list[Stretch]:
        source, inner = self._blend(index)
        return self.datasets[source].stretches(inner)

    def samples_in(self, epochs: int) -> int:
        """Number of samples until the first source of the blend is used up."""
        return min(self._blend.index_of(i, dataset.samples_in(epochs)) for i, dataset in enumerate(self.datasets))


def checked_ids(tokens: npt.NDArray[np.int64], shard: Shard) -> npt.NDArray[np.int64]:
    """Check the token ids of a sample against the largest id recorded for the shard, and return them.

    Files too large to verify at every start may be damaged. A GPU kernel that reads an embedding row beyond the
    vocabulary fails without naming the cause, so we check here.
    """
    if tokens.min() < 0 or tokens.max() > shard.max_token_id:
        folder, is_prepared = shard.prefix.parent, shard.origins is not None
        remedy = f"remove {folder} to prepare it again" if is_prepared else "copy the pair again from the original"
        raise DataError(
            f"{bin_path(shard.prefix)} is damaged: it holds token ids outside 0 to {shard.max_token_id:,}, the range "
            "when it was written; for details run `python -m megatron_lite.data inspect --verify "
            f"{shlex.quote(str(folder if is_prepared else shard.prefix))}`; {remedy}"
        )
    return tokens


def damaged_sentences(shard: Shard) -> DataError:
    assert shard.sentences is not None
    return DataError(
        f"{shard.sentences} is damaged: sentence positions are not in ascending order; remove "
        f"{shard.sentences.parent} to prepare it again"
    )


class ChainedDataset(Generic[Sample]):
    """The first counts[i] samples of each dataset, one dataset after another, repeated without end."""

    def __init__(self, datasets: Sequence[SampleDataset[Sample]], counts: Sequence[int]) -> None:
        self.datasets = datasets
        self._ends = np.cumsum(counts)

    def sample(self, index: int) -> Sample:
        source, inner = self._place(index)
        return self.datasets[source].sample(inner)

    def stretches(self, index: int) -> list[Stretch]:
        source, inner = self._place(index)
        return self.datasets[source].stretches(inner)

    def samples_in(self, epochs: int) -> int:
        return epochs * int(self._ends[-1])

    def _place(self, index: int) -> tuple[int, int]:
        place = index % int(self._ends[-1])
        source = int(self._ends.searchsorted(place, side="right"))
        return source, place - (int(self._ends[source - 1]) if source else 0)


def windows_in(num_tokens: int, window_tokens: int, stride_tokens: int) -> int:
    """Number of whole windows of a stream that start every `stride_tokens` tokens."""
    return 0 if num_tokens < window_tokens else (num_tokens - window_tokens) // stride_tokens + 1


def blended(datasets: Sequence[SampleDataset[Sample]], weights: Sequence[Fraction], seed: int) -> SampleDataset[Sample]:
    """Blend several datasets; a single one is returned unchanged."""
    return datasets[0] if len(datasets) == 1 else BlendedDataset(datasets, weights, seed)
