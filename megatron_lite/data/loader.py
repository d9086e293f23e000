"""From a global sample index to the tensors of a step.

b: micro-batch size, d: positions whose labels are predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.blend import normalised
from megatron_lite.data.dataset import SampleDataset, WindowDataset, blended
from megatron_lite.data.pairs import PairDataset
from megatron_lite.data.prepared import PreparedData, Shard
from megatron_lite.data.sampler import stream_key
from megatron_lite.data.samples import Example, PairShape, SentencePair, Text, WindowShape
from megatron_lite.errors import DataError

VALIDATION_SEED = 0  # runs that differ in their seed are compared on the same samples

Shape = WindowShape | PairShape
Dataset = SampleDataset[Text] | SampleDataset[SentencePair]


class MicroBatch(NamedTuple):
    """Inputs, targets and weights of one forward pass."""

    inputs: tuple[torch.Tensor, ...]  # each [b, length] int64, or [b] where the field has no length
    labels: torch.Tensor  # [b, d] int64
    loss_weights: torch.Tensor  # [b, d] fp32: 0 where the prediction does not count
    sequence_labels: torch.Tensor | None = None  # [b] int64, where samples have a class as a whole
    sequence_weights: torch.Tensor | None = None  # [b] fp32: 1


class InputField(Protocol):
    """`models.activations.Field`, as far as batches go."""

    @property
    def length(self) -> int | None: ...


class ExampleMaker(Protocol):
    """`objectives.base.Objective`, as far as batches go."""

    @property
    def inputs(self) -> Sequence[InputField]: ...
    @property
    def label_length(self) -> int: ...
    @property
    def has_sequence_label(self) -> bool: ...
    def example(self, text: Any, key: int) -> Example: ...


def training_dataset(prepared: PreparedData, config: RunConfig, shape: Shape) -> Dataset:
    """The training samples of a run, in the order that train.seed decides.

    Raises:
        DataError: a source has not one sample, or does not know its sentences.
    """
    used = [(shard, weight) for shard, weight in zip(prepared.train, prepared.weights, strict=True) if weight > 0]
    datasets = [_dataset(shard, shape, prepared, config.train.seed) for shard, _ in used]
    for dataset in datasets:
        if dataset.samples_per_epoch == 0:
            raise _no_sample(dataset, config.data.seq_length, shape, "training", "add text")
    return _blended(datasets, [weight for _, weight in used], config.train.seed)


def validation_dataset(prepared: PreparedData, config: RunConfig, shape: Shape) -> Dataset:
    """The validation samples; sample i is the same at every validation. Sources too small for one sample stay out.

    Raises:
        DataError: no source holds out enough for one sample, or one does not know its sentences.
    """
    pairs = list(zip(prepared.validation, prepared.validation_weights, strict=True))
    built = [(_dataset(shard, shape, prepared, VALIDATION_SEED), weight) for shard, weight in pairs if weight > 0]
    used = [(dataset, weight) for dataset, weight in built if dataset.samples_per_epoch > 0]
    if not used:
        largest = max((dataset for dataset, _ in built), key=lambda dataset: dataset.shard.tokens)
        raise _no_sample(largest, config.data.seq_length, shape, "validation", "raise data.validation_fraction")
    return _blended([dataset for dataset, _ in used], [weight for _, weight in used], VALIDATION_SEED)


def micro_batches(
    dataset: SampleDataset[Any],
    objective: ExampleMaker,
    first_sample: int,
    micro_batch_size: int,
    num_micro_batches: int,
    seed: int,
) -> list[MicroBatch]:
    """Consecutive samples from `first_sample` on, as micro-batches.

    Args:
        first_sample: global index of this rank's first sample of the step.
        seed: with the global index, the key of a sample's random choices.
    """
    count = micro_batch_size * num_micro_batches
    inputs = [np.empty((count,) if f.length is None else (count, f.length), np.int64) for f in objective.inputs]
    labels = np.empty((count, objective.label_length), np.int64)
    weights = np.empty((count, objective.label_length), np.float32)
    classes = np.empty(count, np.int64) if objective.has_sequence_label else None
    for row in range(count):
        index = first_sample + row
        example = objective.example(dataset.sample(index), stream_key(seed, index))
        for column, values in zip(inputs, example.inputs, strict=True):
            column[row] = values
        labels[row] = example.labels
        weights[row] = example.loss_weights
        if classes is not None:
            assert example.sequence_label is not None
            classes[row] = example.sequence_label
    return _cut(inputs, labels, weights, classes, micro_batch_size)


def _cut(
    inputs: list[np.ndarray], labels: np.ndarray, weights: np.ndarray, classes: np.ndarray | None, size: int
) -> list[MicroBatch]:
    """Arrays of all samples of a step as tensors of `size` samples each."""
    columns = zip(*(torch.from_numpy(column).split(size) for column in inputs), strict=True)
    batches = [
        MicroBatch(*parts)
        for parts in zip(
            columns, torch.from_numpy(labels).split(size), torch.from_numpy(weights).split(size), strict=True
        )
    ]
    if classes is None:
        return batches
    ones = torch.ones(len(classes), dtype=torch.float32)
    both = zip(batches, torch.from_numpy(classes).split(size), ones.split(size), strict=True)
    return [batch._replace(sequence_labels=c, sequence_weights=w) for batch, c, w in both]


def _dataset(shard: Shard, shape: Shape, prepared: PreparedData, seed: int) -> WindowDataset | PairDataset:
    if (isinstance(shape, PairShape) or shape.sentences) and shard.sentences is None:
        raise DataError(
            f"{shard.source} tells no sentences, which this objective needs: these shards came without a tokenizer; "
            "name its folder in data.tokenizer"
        )
    if isinstance(shape, PairShape):
        return PairDataset(shard, shape, seed, prepared.eod_id)
    return WindowDataset(shard, shape.tokens, shape.stride, seed, shape.sentences)


def _blended(datasets: Sequence[WindowDataset | PairDataset], weights: list[float], seed: int) -> Dataset:
    shares = normalised(weights, len(weights))
    return blended(datasets, shares, seed)  # type: ignore[return-value]  # all of one kind


def _no_sample(
    dataset: WindowDataset | PairDataset, seq_length: int, shape: Shape, which: str, remedy: str
) -> DataError:
    shard = dataset.shard
    if isinstance(dataset, PairDataset):
        return DataError(
            f"{shard.source} has {shard.documents - dataset.skipped_documents} {which} documents of two or more "
            f"sentences; pairs of sentences need 2 of them ({dataset.skipped_documents:,} shorter ones were skipped); "
            f"check how data.source is split into documents, or {remedy}"
        )
    return DataError(
        f"data.seq_length={seq_length} needs at least {shape.tokens:,} {which} tokens; {shard.source} has "
        f"{shard.tokens:,}; use a smaller data.seq_length, or {remedy}"
    )
