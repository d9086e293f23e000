"""Which samples of the shards this rank reads, and when."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.data.samples.batch import MicroBatch, micro_batches
from megatron_lite.data.samples.loader import VALIDATION_SEED, Dataset, examples, training_dataset
from megatron_lite.data.samples.provenance import Provenance
from megatron_lite.data.samples.skips import Skips
from megatron_lite.data.shards.prepared import PreparedData
from megatron_lite.objectives.base import Example, Objective
from megatron_lite.optim.batch_ramp import BatchStep
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.evaluation import HeldOut

NOTHING_SKIPPED = Skips()


class ShardSource:
    """Micro-batches of prepared shards for one data-parallel rank.

    Rank d of D takes the d-th contiguous part of each global batch, so the samples of a batch do not depend on the
    layout. The first stage reads the model's inputs and the last one the labels; the stages between them open no file.

    Attributes:
        skips: which samples are left out; a rollback replaces it, on all ranks together.
        held_out: the samples that the run validates on.
    Raises:
        DataError: the shards do not hold a full sample, or are damaged.
    """

    def __init__(
        self,
        prepared: PreparedData,
        config: ResolvedConfig,
        objective: Objective,
        context: ParallelContext,
        skips: Skips = NOTHING_SKIPPED,
    ) -> None:
        self._skips = skips
        self._prepared = prepared
        self._config = config
        self._objective = objective
        self._context = context
        self._training: Dataset | None = None
        if context.is_first_stage or context.is_last_stage:
            self._training = training_dataset(prepared, config, objective.shape)
        self.held_out = HeldOut.of_run(prepared, config, objective, context)

    @property
    def skips(self) -> Skips:
        """The training samples that the run leaves out."""
        return self._skips

    def leave_out(self, skips: Skips) -> None:
        """Leave out these samples from now on."""
        self._skips = skips

    @property
    def skipped_documents(self) -> int:
        """Training documents of a single sentence, which make no sentence pair; 0 on ranks that do not read."""
        parts = getattr(self._training, "datasets", [self._training])
        return sum(getattr(part, "skipped_documents", 0) for part in parts)

    def notes(self) -> Iterator[str]:
        """Lines about what is unusual in the training data; none on ranks that do not read."""
        if self.skipped_documents:
            yield f"{self.skipped_documents:,} documents of a single sentence are skipped: they make no sentence pair"
        for part in getattr(self._training, "datasets", ()):
            if getattr(part, "passes_per_epoch", 1) > 1:
                yield (
                    f"{part.shard.source} has {part.num_tokens:,} training tokens, fewer than a sample: each of its "
                    f"samples repeats them {part.passes_per_epoch:,} times"
                )

    def provenance(self) -> Provenance:
        """Which documents the training samples come from, on ranks that read."""
        assert self._training is not None
        return Provenance(self._training, self._prepared)

    def samples_in(self, epochs: int) -> int:
        """The number of training samples in so many passes over the data, on ranks that read."""
        assert self._training is not None
        return self.skips.count(self._training.samples_in(epochs))

    def training(self, batch: BatchStep) -> list[MicroBatch]:
        """This rank's part of a step. Its `first_sample` counts consumed samples, which excludes those left out.

        Each sample keeps its global number, which seeds its random choices.
        """
        own = self._own_part(batch.global_batch_size)
        indices = self.skips.indices(batch.first_sample + own.start, len(own))
        if self._training is None:
            return []
        train = self._config.train
        return micro_batches(self._training, self._objective, indices, train.micro_batch_size, train.seed)

    def examples(self, *, training: bool, count: int) -> Iterator[Example]:
        """The first samples of a set, on ranks that read."""
        dataset = self._training if training else self.held_out.dataset
        assert dataset is not None
        seed = self._config.train.seed if training else VALIDATION_SEED
        return examples(dataset, self._objective, range(count), seed)

    def _own_part(self, num_samples: int) -> range:
        """Positions of this rank's samples in a global batch."""
        own = num_samples // self._context.data_size
        first = self._context.data_rank * own
        return range(first, first + own)
