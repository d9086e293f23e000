"""Samples by number: any sample of any epoch is found by arithmetic, without an index on disk.

One epoch of a source: its documents in an order that belongs to (seed, epoch), one after another, cut into windows of
seq_length + 1 tokens that start every seq_length tokens. The windows come in an order that belongs to (seed, epoch)
too. A tail shorter than a window is dropped in that epoch. Then the next epoch follows, for ever.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megatron_lite.data.blend import Blend
from megatron_lite.data.indexed import IndexedReader
from megatron_lite.data.prepared import Shard, documents_of_part
from megatron_lite.data.sampler import Permutation, shuffled_order, stream_key

EPOCHS_IN_MEMORY = 2  # neighbouring samples at the end of an epoch need both


class SampleDataset(Protocol):
    """Anything that gives samples by number."""

    seq_length: int
    eod_id: int | None

    def sample(self, index: int) -> npt.NDArray[np.int64]:
        """Tokens [seq_length + 1] of the index-th sample; index may be any number from 0 up."""
        ...

    def read_into(self, index: int, out: npt.NDArray[np.int64]) -> None:
        """Write the sample into `out` [seq_length + 1]."""
        ...


class CausalLMDataset:
    """Samples of one shard.

    Args:
        seed: decides the order; also the number of the source, so that sources differ.
        eod_id: the end-of-document token, for loss masks; None = unknown.
    Raises:
        DataError: the files are damaged. The caller has checked that there is at least one sample.
    """

    def __init__(self, shard: Shard, seq_length: int, seed: int, eod_id: int | None = None) -> None:
        self.seq_length = seq_length
        self.eod_id = eod_id
        self.shard = shard
        self._reader = IndexedReader(shard.prefix)
        documents = documents_of_part(self._reader, shard.part, shard.validation_fraction)
        self._starts = self._reader.document_starts[documents]
        self._lengths = self._reader.document_lengths[documents]
        self._key = stream_key(seed, shard.source_index)
        self.num_tokens = int(self._lengths.sum())
        self.samples_per_epoch = samples_in(self.num_tokens, seq_length)
        assert self.samples_per_epoch > 0
        self._epoch = lru_cache(maxsize=EPOCHS_IN_MEMORY)(self._build_epoch)

    def sample(self, index: int) -> npt.NDArray[np.int64]:
        out = np.empty(self.seq_length + 1, np.int64)
        self.read_into(index, out)
        return out

    def read_into(self, index: int, out: npt.NDArray[np.int64]) -> None:
        epoch, place = divmod(index, self.samples_per_epoch)
        starts, ends, order = self._epoch(epoch)
        position = order(place) * self.seq_length  # in the stream of this epoch
        document = int(ends.searchsorted(position, side="right"))
        tokens = self._reader.tokens
        filled, wanted = 0, len(out)
        while filled < wanted:
            left = int(ends[document]) - position
            taken = min(left, wanted - filled)
            begin = int(starts[document]) - left  # `starts` holds the document's end in the file
            out[filled : filled + taken] = tokens[begin : begin + taken]
            filled += taken
            position += taken
            document += 1

    def _build_epoch(self, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Permutation]:
        """End of each document in the file and in the stream of this epoch [documents], and the order of windows."""
        order = shuffled_order(len(self._starts), self._key, epoch)
        lengths = self._lengths[order]
        file_ends = self._starts[order] + lengths
        return file_ends, np.cumsum(lengths), Permutation(self.samples_per_epoch, self._key, epoch, 1)


class BlendedDataset:
    """Samples of several sources, mixed by weight."""

    def __init__(self, datasets: list[CausalLMDataset], weights: tuple[float, ...], seed: int) -> None:
        self.seq_length = datasets[0].seq_length
        self.eod_id = datasets[0].eod_id
        self.datasets = datasets
        self._blend = Blend(weights, seed)

    def sample(self, index: int) -> npt.NDArray[np.int64]:
        source, inner = self._blend(index)
        return self.datasets[source].sample(inner)

    def read_into(self, index: int, out: npt.NDArray[np.int64]) -> None:
        source, inner = self._blend(index)
        self.datasets[source].read_into(inner, out)


def samples_in(num_tokens: int, seq_length: int) -> int:
    """Windows of seq_length + 1 tokens that start every seq_length tokens."""
    return max((num_tokens - 1) // seq_length, 0)


def blended(datasets: list[CausalLMDataset], weights: tuple[float, ...], seed: int) -> SampleDataset:
    """One dataset of several; a single one is returned as it is."""
    return datasets[0] if len(datasets) == 1 else BlendedDataset(datasets, weights, seed)
