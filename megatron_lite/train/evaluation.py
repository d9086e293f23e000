"""Evaluation on held-out samples, both for the validation of a run and for `python -m launch evaluate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.data.samples.batch import MicroBatch, micro_batches
from megatron_lite.data.samples.loader import (
    VALIDATION_SEED,
    Dataset,
    held_out_datasets,
    one_pass_over,
    validation_dataset,
)
from megatron_lite.data.shards.prepared import PreparedData
from megatron_lite.engine.engine import Engine, Evaluation
from megatron_lite.objectives.base import Objective
from megatron_lite.parallel.agreement import agreed
from megatron_lite.parallel.context import ParallelContext

ROUND_MICRO_BATCHES = 256  # that a rank holds in memory at once


class Loader(Protocol):
    """Samples to evaluate on."""

    def rounds(self) -> Iterator[tuple[list[MicroBatch], int]]:
        """This rank's micro-batches in rounds, each with its number of micro-batches on every rank that reads. The same
        at every call; all ranks get the same number of rounds, stages that do not read get empty ones."""


class HeldOut:
    """Held-out samples 0 .. num_samples - 1, of which data-parallel rank d of D takes the d-th contiguous part.

    If they do not divide evenly, the last ranks fill their micro-batches with samples of zero weight.

    Args:
        dataset: None on stages that do not read data.
    """

    def __init__(
        self,
        dataset: Dataset | None,
        num_samples: int,
        objective: Objective,
        context: ParallelContext,
        micro_batch_size: int,
    ) -> None:
        self.dataset = dataset
        self.num_samples = num_samples
        self._objective = objective
        self._context = context
        self._micro_batch_size = micro_batch_size

    @classmethod
    def of_run(
        cls, prepared: PreparedData, config: ResolvedConfig, objective: Objective, context: ParallelContext
    ) -> HeldOut:
        """The samples that the run validates on: train.eval_batches global batches.

        Raises:
            DataError: there is no sample at all.
        """
        dataset = validation_dataset(prepared, config, objective.shape) if _reads(context) else None
        count = config.train.eval_batches * config.train.global_batch_size
        return cls(dataset, count, objective, context, config.train.micro_batch_size)

    @classmethod
    def one_pass(
        cls, prepared: PreparedData, config: ResolvedConfig, objective: Objective, context: ParallelContext
    ) -> HeldOut:
        """Each held-out sample once. A collective of all ranks.

        Raises:
            DataError: there is no sample at all.
        """
        dataset, count = None, 0
        if _reads(context):
            dataset, count = one_pass_over(held_out_datasets(prepared, config, objective.shape))
        return cls(dataset, agreed(count), objective, context, config.train.micro_batch_size)

    def rounds(self) -> Iterator[tuple[list[MicroBatch], int]]:
        own = self._own_part()
        stride = ROUND_MICRO_BATCHES * self._micro_batch_size
        for first in range(own.start, own.stop, stride):
            part = range(first, min(first + stride, own.stop))
            yield self._micro_batches(part), len(part) // self._micro_batch_size

    def _own_part(self) -> range:
        """Indices of this rank's samples; those from num_samples on are padding with zero weight."""
        together = self._context.data_size * self._micro_batch_size
        own = -(-self.num_samples // together) * self._micro_batch_size
        first = self._context.data_rank * own
        return range(first, first + own)

    def _micro_batches(self, part: range) -> list[MicroBatch]:
        if self.dataset is None:
            return []
        size = self._micro_batch_size
        indices = [index % self.num_samples for index in part]
        batches = micro_batches(self.dataset, self._objective, indices, size, VALIDATION_SEED)
        return [
            batch if first + size <= self.num_samples else _without(batch, self.num_samples - first)
            for batch, first in zip(batches, part[::size], strict=True)
        ]


def evaluate(engine: Engine, loader: Loader) -> Evaluation:
    """A collective of all ranks."""
    return joined([engine.evaluate(batches, count) for batches, count in loader.rounds()])


def joined(parts: Sequence[Evaluation]) -> Evaluation:
    """Combine the evaluations of several parts into one over all their samples."""
    if len(parts) == 1:
        return parts[0]
    tokens = sum(part.tokens for part in parts)
    sequences = sum(part.sequences for part in parts)
    token_loss = sum(part.token_loss * part.tokens for part in parts) / max(tokens, 1e-20)
    class_loss = sum((part.loss - part.token_loss) * part.sequences for part in parts) / max(sequences, 1e-20)
    hits = [(part.sequence_accuracy, part.sequences) for part in parts if part.sequence_accuracy is not None]
    return Evaluation(
        loss=token_loss + class_loss,
        token_loss=token_loss,
        accuracy=sum(part.accuracy * part.tokens for part in parts) / max(tokens, 1e-20),
        sequence_accuracy=sum(share * count for share, count in hits) / sequences if hits else None,
        tokens=tokens,
        sequences=sequences,
    )


def _reads(context: ParallelContext) -> bool:
    return context.is_first_stage or context.is_last_stage


def _without(batch: MicroBatch, counted: int) -> MicroBatch:
    """The micro-batch with loss weights of 0 for all but its first `counted` samples; for all if `counted` < 1."""
    counts = torch.arange(len(batch.labels)) < counted
    batch = batch._replace(loss_weights=batch.loss_weights * counts[:, None])
    if batch.sequence_weights is None:
        return batch
    return batch._replace(sequence_weights=batch.sequence_weights * counts)
