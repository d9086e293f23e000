"""The training loop: batches in, optimizer steps out, callbacks around them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.data.samples.batch import MicroBatch
from megatron_lite.data.samples.skips import Skips
from megatron_lite.engine.engine import Engine, Evaluation
from megatron_lite.engine.step_result import LaunchedStep, StepResult
from megatron_lite.observe.heartbeat import Heartbeat, Phase
from megatron_lite.observe.metrics import ROLLBACKS
from megatron_lite.optim.batch_ramp import BatchSchedule, BatchStep, Origin
from megatron_lite.optim.learning_rate import learning_rate_at
from megatron_lite.train.evaluation import Loader, evaluate
from megatron_lite.train.stopping import StopAgreement, StopRequested


class BatchSource(Protocol):
    """Where this rank's micro-batches come from; empty lists on stages that need none."""

    @property
    def skips(self) -> Skips:
        """The training samples that the run leaves out."""

    @property
    def held_out(self) -> Loader:
        """What the run validates on."""

    def training(self, batch: BatchStep) -> list[MicroBatch]:
        """This data-parallel rank's part of one global batch."""

    def leave_out(self, skips: Skips) -> None:
        """Leave out these samples from now on."""


@dataclass(frozen=True)
class StepRecord:
    """One finished step; equal on every rank except for the times."""

    step: int  # counts from 1
    batch: BatchStep
    result: StepResult
    learning_rate: float
    step_seconds: float  # data included
    data_seconds: float
    spent: Mapping[Phase, float]  # seconds of this rank's training thread in each phase
    sequences: Sequence[Tensor] = ()  # the loss share and the token weight of each sequence, see `TokenLoss`
    newer: int = 0  # steps that have been launched since

    @property
    def is_finite(self) -> bool:
        """Whether the loss and the update were finite; a skipped update has added nothing to the weights."""
        return math.isfinite(self.result.loss) and (math.isfinite(self.result.grad_norm) or self.result.skipped)


@dataclass(frozen=True)
class Findings:
    """What the observer found about a finished step, for its line in metrics.jsonl and for the callbacks."""

    spike: bool
    ideal_bubble: float  # pipeline bubble of the schedule, as a share of the step
    shares: Mapping[str, float]  # shares of the step's time by kind of work
    rollbacks: int = 0  # in the run so far
    layers: Mapping[str, Any] | None = None  # figures of each layer and stage; None = not measured in this step

    def figures(self) -> dict[str, Any]:
        """The figures under their names in metrics.jsonl."""
        found: dict[str, Any] = {"spike": self.spike, **self.shares, "ideal_bubble": self.ideal_bubble}
        if self.rollbacks:
            found[ROLLBACKS] = self.rollbacks
        return found | dict(self.layers or {})


class Observer(Protocol):
    """Called with each finished step before the callbacks."""

    def observe(self, record: StepRecord) -> Findings:
        """May be a collective of all ranks."""


class Callback:
    """What a run does besides training steps. Each method is called on every rank, in the order of the callbacks."""

    def before_step(self, trainer: Trainer, step: int) -> None:
        """`step` counts from 1."""

    def after_step(self, trainer: Trainer, record: StepRecord, findings: Findings) -> None:
        """A callback may call `trainer.rewind`; the callbacks after it are then not called, as the step is undone."""

    def after_evaluation(self, trainer: Trainer, step: int, found: Evaluation) -> None:
        """Called after an evaluation of this step's weights on the held-out samples."""

    def at_end(self, trainer: Trainer) -> None:
        """After the last step."""


@dataclass(frozen=True)
class _Unread:
    """A step that is launched, and whose figures nobody has read."""

    step: int  # counts from 1
    batch: BatchStep
    learning_rate: float
    launched: LaunchedStep
    start: float  # time.perf_counter()
    data_seconds: float
    spent: Mapping[Phase, float]


def is_due(step: int, interval: int, last_step: int) -> bool:
    """Whether something that happens every `interval` steps (0 = never) and at the end is due after this step."""
    return step == last_step or (interval > 0 and step % interval == 0)


class Trainer:
    """One attempt at a run, until its last step or until it is asked to stop."""

    def __init__(
        self,
        config: ResolvedConfig,
        engine: Engine,
        source: BatchSource,
        schedule: BatchSchedule,
        agreement: StopAgreement,
        observer: Observer,
        callbacks: Sequence[Callback],
        first_step: int,
        find_last_step: Callable[[BatchSchedule], int],
        heartbeat: Heartbeat,
        *,
        reads_late: bool = False,
    ) -> None:
        """A collective of all ranks.

        Args:
            first_step: 0 unless resumed.
            find_last_step: returns train.steps, or less if the data ends before; a collective of all ranks.
            reads_late: read a step's figures while the device computes the next step, unless something needs them
                before, so that the device never waits for the host. Only if nothing reacts to a spike.
        """
        self.config, self.engine, self.source, self.heartbeat = config, engine, source, heartbeat
        self._agreement, self._observer, self._callbacks = agreement, observer, callbacks
        self._find_last_step = find_last_step
        self._schedule = schedule
        self._finished_step = first_step
        self._last_step = find_last_step(schedule)
        self._reads_late = reads_late
        self._unread: _Unread | None = None
        self._last_read = 0.0  # time.perf_counter()

    @property
    def schedule(self) -> BatchSchedule:
        """Which samples each step consumes."""
        return self._schedule

    @property
    def finished_step(self) -> int:
        """0 = none."""
        return self._finished_step

    @property
    def last_step(self) -> int:
        return self._last_step

    def fit(self) -> None:
        """
        Raises:
            StopRequested: the ranks were asked to stop, after `finished_step`; on every rank alike.
        """
        try:
            while self._finished_step < self._last_step:
                self._agreement.at_boundary()
                self._step()
        except StopRequested:
            self._finish(newer=0)
            raise
        for callback in self._callbacks:
            callback.at_end(self)

    def _step(self) -> None:
        for callback in self._callbacks:
            callback.before_step(self, self._finished_step + 1)
        launched = self._launch(self._finished_step)
        self._finish(newer=1)
        self._unread, self._finished_step = launched, launched.step
        if not self._reads_late or self._is_needed_now(launched.step):
            self._finish(newer=0)

    def _is_needed_now(self, step: int) -> bool:
        """Whether something may follow this step, before the next, that needs its figures or its weights."""
        train = self.config.train
        intervals = (train.save_interval, train.eval_interval, self.config.stability.layer_interval)
        return any(is_due(step, interval, self._last_step) for interval in intervals)

    def _finish(self, newer: int) -> None:
        """Read the figures of the step that was launched last, if they are still unread, and call all callbacks.

        Args:
            newer: number of steps launched after it.
        """
        if self._unread is None:
            return
        step, self._unread = self._unread, None
        result = step.launched.read()
        read = time.perf_counter()
        # The device starts this step when it has finished the one before.
        seconds = read - max(step.start, self._last_read)
        self._last_read = read
        record = StepRecord(
            step.step,
            step.batch,
            result,
            step.learning_rate,
            seconds,
            step.data_seconds,
            step.spent,
            step.launched.sequences,
            newer,
        )
        findings = self._observer.observe(record)
        finished = self._finished_step
        for callback in self._callbacks:
            callback.after_step(self, record, findings)
            if self._finished_step != finished:
                break

    def _launch(self, step: int) -> _Unread:
        start = time.perf_counter()
        self.heartbeat.begin_step(step + 1)
        batch = self._schedule.at(step)
        micro_batches = self.source.training(batch)
        data_end = time.perf_counter()
        learning_rate = learning_rate_at(step + 1, self.config.optimizer, self.config.train.steps)
        measure = self.config.stability.measures_layers(step + 1)
        launched = self.engine.launch_step(micro_batches, batch, learning_rate, measure_update=measure)
        spent = self.heartbeat.spent  # before the phase changes, which would add to it
        return _Unread(step + 1, batch, learning_rate, launched, start, data_end - start, spent)

    def evaluate(self, step: int) -> None:
        """Evaluate this step's weights on the held-out samples and call all callbacks; a collective of all ranks."""
        self.heartbeat.enter(Phase.EVALUATE)
        found = evaluate(self.engine, self.source.held_out)
        for callback in self._callbacks:
            callback.after_evaluation(self, step, found)

    def rewind(self, step: int, samples: int, find_skips: Callable[[], Skips]) -> None:
        """Continue from this step, whose weights and optimizer state are loaded again. A collective of all ranks.

        Args:
            samples: number of samples consumed up to this step.
            find_skips: returns the samples to leave out from now on; called with the old schedule still in place, but
                with this step already as the finished one, so that a stop request within it stops there.
        """
        self._finished_step = step
        self.source.leave_out(find_skips())
        self._schedule = BatchSchedule(self.config.train, Origin(step, samples))
        self._last_step = self._find_last_step(self._schedule)
