"""From a global sample index to the sample that a model reads; `batch` converts it to tensors. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, Protocol

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.sampler import stream_key
from megatron_lite.data.samples.dataset import ChainedDataset, SampleDataset, WindowDataset, blended
from megatron_lite.data.samples.pairs import PairDataset
from megatron_lite.data.samples.sample_types import Example, PairShape, SentencePair, Text, WindowShape
from megatron_lite.data.shards.prepared import PreparedData, Shard
from megatron_lite.data.tokenizer.needs import no_sentences
from megatron_lite.errors import DataError

VALIDATION_SEED = 0  # runs that differ in their seed are compared on the same samples

Shape = WindowShape | PairShape
Dataset = SampleDataset[Text] | SampleDataset[SentencePair]


class ExampleMaker(Protocol):
    """The part of `objectives.base.Objective` that batches need."""

    def example(self, text: Any, key: int) -> Example: ...


def training_dataset(prepared: PreparedData, config: RunConfig, shape: Shape) -> Dataset:
    """The training samples of a run, in the order given by train.seed.

    A source smaller than a window is repeated within one, if all sources together fill a window.

    Raises:
        DataError: a source is too small for a single sample, or lacks required sentence boundaries.
    """
    used = [(shard, weight) for shard, weight in zip(prepared.train, prepared.weights, strict=True) if weight > 0]
    repeat = sum(shard.tokens for shard, _ in used) >= shape.tokens
    datasets = [_dataset(shard, shape, prepared, config.train.seed, repeat) for shard, _ in used]
    remedy = "add text" if len(used) == 1 else "add text, or give it weight 0 in data.weights"
    empty = [dataset for dataset in datasets if dataset.samples_per_epoch == 0]
    if empty:
        faults = (_no_sample(dataset, config.data.seq_length, shape, "training", remedy) for dataset in empty)
        raise DataError("\n".join(faults))
    return _blended(datasets, [weight for _, weight in used], config.train.seed)


def validation_dataset(prepared: PreparedData, config: RunConfig, shape: Shape) -> Dataset:
    """The validation samples; sample i is the same at every validation. Sources too small for one sample are skipped.

    Raises:
        DataError: no source holds out enough for one sample, or one lacks required sentence boundaries.
    """
    used = held_out_datasets(prepared, config, shape)
    weights = [weight for shard, weight in _weighted(prepared) if any(one.shard is shard for one in used)]
    return _blended(used, weights, VALIDATION_SEED)


def held_out_datasets(prepared: PreparedData, config: RunConfig, shape: Shape) -> list[WindowDataset | PairDataset]:
    """One validation dataset per source, in the order of the configuration.

    Raises:
        DataError: no source holds out enough for one sample, or one lacks required sentence boundaries.
    """
    built = [_dataset(shard, shape, prepared, VALIDATION_SEED) for shard, _ in _weighted(prepared)]
    used = [dataset for dataset in built if dataset.samples_per_epoch > 0]
    if not used:
        largest = max(built, key=lambda dataset: dataset.shard.tokens)
        separate = config.data.validation_source is not None
        remedy = "add text to it" if separate else "raise data.validation_fraction"
        raise DataError(_no_sample(largest, config.data.seq_length, shape, "validation", remedy))
    return used


def _weighted(prepared: PreparedData) -> list[tuple[Shard, Fraction]]:
    """The validation shards with a positive weight."""
    pairs = zip(prepared.validation, prepared.validation_weights, strict=True)
    return [(shard, weight) for shard, weight in pairs if weight > 0]


def one_pass_over(datasets: Sequence[WindowDataset | PairDataset]) -> tuple[Dataset, int]:
    """All samples of one pass over each dataset, one dataset after another, and their number."""
    counts = [dataset.samples_per_epoch for dataset in datasets]
    together: Dataset = datasets[0] if len(datasets) == 1 else ChainedDataset(datasets, counts)  # type: ignore[assignment]
    return together, sum(counts)


def examples(
    dataset: SampleDataset[Any], objective: ExampleMaker, indices: Iterable[int], seed: int
) -> Iterator[Example]:
    """The objective's examples for these global indices. Each sample has its own random key."""
    for index in indices:
        yield objective.example(dataset.sample(index), stream_key(seed, index))


def _dataset(
    shard: Shard, shape: Shape, prepared: PreparedData, seed: int, repeat: bool = False
) -> WindowDataset | PairDataset:
    if (isinstance(shape, PairShape) or shape.sentences) and shard.sentences is None:
        raise no_sentences(shard.source)
    if isinstance(shape, PairShape):
        return PairDataset(shard, shape, seed, prepared.eod_id)
    return WindowDataset(shard, shape.tokens, shape.stride, seed, shape.sentences, repeat)


def _blended(datasets: Sequence[WindowDataset | PairDataset], weights: list[Fraction], seed: int) -> Dataset:
    return blended(datasets, weights, seed)  # type: ignore[return-value]  # all of one kind


def _no_sample(dataset: WindowDataset | PairDataset, seq_length: int, shape: Shape, which: str, remedy: str) -> str:
    shard = dataset.shard
    if isinstance(dataset, PairDataset):
        return (
            f"{shard.source} has {shard.documents - dataset.skipped_documents} {which} documents of two or more "
            f"sentences; pairs of sentences need 2 of them ({dataset.skipped_documents:,} shorter ones were skipped); "
            f"check how data.source is split into documents, or {remedy}"
        )
    return (
        f"data.seq_length={seq_length} needs at least {shape.tokens:,} {which} tokens; {shard.source} has "
        f"{shard.tokens:,}; use a smaller data.seq_length, or {remedy}"
    )
