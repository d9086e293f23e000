"""The training loop: batches in, optimizer steps out, callbacks around them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.samples.batch import MicroBatch
from megatron_lite.data.samples.skips import Skips
from megatron_lite.engine.engine import Engine, Evaluation, StepResult
from megatron_lite.observe.heartbeat import Heartbeat, Phase
from megatron_lite.optim.batch_ramp import BatchSchedule, BatchStep
from megatron_lite.optim.learning_rate import learning_rate_at
from megatron_lite.train.evaluation import Loader, evaluate
from megatron_lite.train.stopping import StopAgreement


class BatchSource(Protocol):
    """Where this rank's micro-batches come from; empty lists on stages that need none."""

    skips: Skips
    """The training samples that the run leaves out."""

    @property
    def held_out(self) -> Loader:
        """What the run validates on."""

    def training(self, batch: BatchStep) -> list[MicroBatch]:
        """This data-parallel rank's part of one global batch."""


@dataclass(frozen=True)
class StepRecord:
    """One finished step; equal on every rank but for the times."""

    step: int  # counts from 1
    batch: BatchStep
    result: StepResult
    learning_rate: float
    step_seconds: float  # data included
    data_seconds: float

    @property
    def is_sound(self) -> bool:
        """The loss is a number, and so is what was added to the weights."""
        return math.isfinite(self.result.loss) and (math.isfinite(self.result.grad_norm) or self.result.skipped)


class Callback(Protocol):
    """What a run does besides stepping. Called on every rank, in the order of the list.

    One that takes the run back sets `trainer.finished_step`; those behind it are then not called, for there is no step.
    """

    def after_step(self, trainer: Trainer, record: StepRecord) -> None: ...


@dataclass
class Trainer:
    """One attempt at a run: from `first_step` (0 unless resumed) to `last_step`, or until it is asked to stop."""

    config: RunConfig
    engine: Engine
    source: BatchSource
    schedule: BatchSchedule
    agreement: StopAgreement
    callbacks: Sequence[Callback]
    first_step: int
    last_step: int  # train.steps, or less where the data ends before
    summary: dict[str, Any] = field(default_factory=dict)
    """Figures that callbacks leave for the end of the run."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    figures: dict[str, Any] = field(default_factory=dict)
    """Figures of a step that callbacks leave for its report."""

    def __post_init__(self) -> None:
        self.finished_step = self.first_step

    def fit(self) -> None:
        """
        Raises:
            StopRequested: the ranks were asked to stop, after `finished_step`; on every rank alike.
        """
        while self.finished_step < self.last_step:
            self.agreement.at_boundary()
            record = self._step(self.finished_step)
            self.finished_step = record.step
            self.figures.clear()
            for callback in self.callbacks:
                callback.after_step(self, record)
                if self.finished_step != record.step:
                    break

    def _step(self, step: int) -> StepRecord:
        start = time.perf_counter()
        self.heartbeat.begin_step(step + 1)
        batch = self.schedule.at(step)
        micro_batches = self.source.training(batch)
        data_end = time.perf_counter()
        learning_rate = learning_rate_at(step + 1, self.config.optimizer, self.config.train.steps)
        measure = self.config.stability.measures_layers(step + 1)
        result = self.engine.train_step(micro_batches, batch, learning_rate, measure_update=measure)
        return StepRecord(
            step=step + 1,
            batch=batch,
            result=result,
            learning_rate=learning_rate,
            step_seconds=time.perf_counter() - start,
            data_seconds=data_end - start,
        )

    def evaluate(self) -> Evaluation:
        """On the held-out samples; a collective of all ranks."""
        self.heartbeat.enter(Phase.EVALUATE)
        return evaluate(self.engine, self.source.held_out)
