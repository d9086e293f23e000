"""Which samples of the shards this rank reads, and when."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.batch import MicroBatch
from megatron_lite.data.loader import (
    VALIDATION_SEED,
    Dataset,
    examples,
    micro_batches,
    training_dataset,
    validation_dataset,
)
from megatron_lite.data.prepared import PreparedData
from megatron_lite.objectives.base import Example, Objective
from megatron_lite.optim.batch_ramp import BatchStep
from megatron_lite.parallel.context import ParallelContext


class ShardSource:
    """Micro-batches of prepared shards for one data-parallel rank.

    Rank d of D takes the d-th contiguous part of each global batch, so that the samples of a batch depend on no layout.
    Stages between the first, which reads the model's inputs, and the last, which reads labels, open no file.

    Raises:
        DataError: the shards hold no full sample, or are damaged.
    """

    def __init__(
        self, prepared: PreparedData, config: RunConfig, objective: Objective, context: ParallelContext
    ) -> None:
        self._config = config
        self._objective = objective
        self._context = context
        self._training: Dataset | None = None
        self._validation: Dataset | None = None
        if context.is_first_stage or context.is_last_stage:
            self._training = training_dataset(prepared, config, objective.shape)
            self._validation = validation_dataset(prepared, config, objective.shape)

    @property
    def skipped_documents(self) -> int:
        """Training documents that give no sample, since they have a single sentence; 0 on ranks that do not read."""
        parts = getattr(self._training, "datasets", [self._training])
        return sum(getattr(part, "skipped_documents", 0) for part in parts)

    def samples_in(self, epochs: int) -> int:
        """Training samples that so many passes over the data give, on ranks that read."""
        assert self._training is not None
        return self._training.samples_in(epochs)

    def training(self, batch: BatchStep) -> list[MicroBatch]:
        seed = self._config.train.seed
        return self._part(self._training, batch.first_sample, batch.global_batch_size, seed)

    def validation(self) -> list[MicroBatch]:
        return self._part(self._validation, 0, self._num_validation_samples, VALIDATION_SEED)

    @property
    def num_validation_micro_batches(self) -> int:
        return self._num_validation_samples // (self._config.train.micro_batch_size * self._context.data_size)

    def examples(self, *, training: bool, count: int) -> Iterator[Example]:
        """The first samples of a set, on ranks that read."""
        dataset = self._training if training else self._validation
        assert dataset is not None
        seed = self._config.train.seed if training else VALIDATION_SEED
        return examples(dataset, self._objective, range(count), seed)

    @property
    def _num_validation_samples(self) -> int:
        return self._config.train.eval_batches * self._config.train.global_batch_size

    def _part(self, dataset: Dataset | None, first_sample: int, num_samples: int, seed: int) -> list[MicroBatch]:
        if dataset is None:
            return []
        own = num_samples // self._context.data_size
        size = self._config.train.micro_batch_size
        first = first_sample + self._context.data_rank * own
        return micro_batches(dataset, self._objective, first, size, own // size, seed)
