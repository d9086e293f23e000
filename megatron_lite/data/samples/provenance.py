"""Trace a sample back to its documents and its text: computed from the seed, without any logs.

The same dataset functions that read a sample also say which parts of which documents it consists of; the origins file
beside the pair says where each document was read. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy.typing as npt

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.samples.dataset import Stretch
from megatron_lite.data.samples.loader import Dataset, Shape, training_dataset
from megatron_lite.data.samples.sample_types import Ids, SentencePair, Text
from megatron_lite.data.shards.origins import read_origins
from megatron_lite.data.shards.prepared import PreparedData, Shard
from megatron_lite.data.tokenizer.tokenizer import Tokenizer
from megatron_lite.errors import DataError


@dataclass(frozen=True)
class DocumentPart:
    """Consecutive tokens of one document that are part of a sample."""

    source: str
    """The name in data.source."""
    file: str
    """Where the document was read: a file, the prefix of an existing pair, or a hub dataset."""
    document: int
    """Number of its row, line or document in that file, from 0, counting empty ones."""
    first_token: int
    """Position of the first token in the document."""
    tokens: int
    place: int
    """Position of the first token in the sample; the second part of a pair follows the first."""


class Provenance:
    """The documents and text of training samples, by global number (as in `ShardSource`; skipped samples count, too).

    Args:
        dataset: the training samples of the run.
    Attributes:
        prepared: the data that they come from.
    """

    def __init__(self, dataset: Dataset, prepared: PreparedData) -> None:
        self.dataset = dataset
        self.prepared = prepared
        self._origins = lru_cache(maxsize=None)(_origins_of)

    @classmethod
    def of(cls, prepared: PreparedData, config: RunConfig, shape: Shape) -> Provenance:
        """Open the data of a run; `shape` is that of its objective.

        Raises:
            DataError: the shards are too small for a single sample, or damaged.
        """
        return cls(training_dataset(prepared, config, shape), prepared)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """None for existing shards that came without a tokenizer."""
        return self.prepared.open_tokenizer()

    def documents(self, index: int) -> list[DocumentPart]:
        """The parts of a sample, in order. Both parts of a pair may come from the same document."""
        return [self._part(stretch) for stretch in self.dataset.stretches(index)]

    def text(self, index: int) -> str:
        """The stored tokens of a sample, decoded (ids without a tokenizer); the parts of a pair on separate lines."""
        return "\n".join(self.decode(part) for part in tokens_of(self.dataset.sample(index)))

    def decode(self, tokens: Ids) -> str:
        """Text of tokens, with special tokens by name; without a tokenizer, their ids."""
        ids = tokens.tolist()
        return self.tokenizer.decode(ids) if self.tokenizer else " ".join(map(str, ids))

    def _part(self, stretch: Stretch) -> DocumentPart:
        shard = stretch.shard
        origins = self._origins(shard)
        file, number = str(shard.prefix), stretch.document
        if origins is not None:
            place, number = origins[stretch.document].item()
            if place >= len(shard.files):
                raise DataError(
                    f"{shard.origins} is damaged: it names file {place:,} of {len(shard.files)}; remove "
                    f"{shard.prefix.parent} to prepare it again"
                )
            file = shard.files[place]
        return DocumentPart(shard.source, file, number, stretch.first_token, stretch.tokens, stretch.place)


def tokens_of(sample: Text | SentencePair) -> tuple[Ids, ...]:
    """The stored tokens of a window, or of both parts of a pair."""
    return (sample.first, sample.second) if isinstance(sample, SentencePair) else (sample.tokens,)


def merged(parts: Mapping[int, Sequence[DocumentPart]]) -> list[dict[str, Any]]:
    """Each document of many samples once, in order of appearance, as JSON objects.

    Args:
        parts: global sample number -> the parts of the sample.
    Returns:
        objects with source, file and document; first_token and tokens, the smallest range of the document that covers
        its tokens in all these samples; and samples, the numbers of the samples that contain some of it.
    """
    found: dict[tuple[str, str, int], list[tuple[int, DocumentPart]]] = {}
    for index, of_sample in parts.items():
        for part in of_sample:
            found.setdefault((part.source, part.file, part.document), []).append((index, part))
    return [_document(uses) for uses in found.values()]


def _document(uses: list[tuple[int, DocumentPart]]) -> dict[str, Any]:
    """One entry of `merged`, from all (sample number, part) of one document."""
    _, one = uses[0]
    first = min(part.first_token for _, part in uses)
    stop = max(part.first_token + part.tokens for _, part in uses)
    return {
        "source": one.source,
        "file": one.file,
        "document": one.document,
        "first_token": first,
        "tokens": stop - first,
        "samples": list(dict.fromkeys(index for index, _ in uses)),
    }


def _origins_of(shard: Shard) -> npt.NDArray[Any] | None:
    return read_origins(shard.origins, shard.origins_bytes) if shard.origins else None
