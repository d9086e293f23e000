"""Which samples and which learning rate each step of a run gets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_lite.config.derived import resolve
from megatron_lite.config.schema import BatchRampConfig, Decay, OptimizerConfig, Precision, RunConfig, TrainConfig
from megatron_lite.data.samples.skips import Skips, Window
from megatron_lite.engine.step_result import LaunchedStep, StepResult
from megatron_lite.errors import DivergedError
from megatron_lite.observe.heartbeat import Heartbeat
from megatron_lite.optim.batch_ramp import BEGINNING, BatchSchedule, BatchStep, Origin
from megatron_lite.train.callbacks import Guard
from megatron_lite.train.loop import Findings, StepRecord, Trainer
from megatron_lite.train.stopping import Reason, StopRequested
from tests.unit.remedies import obeys

# A warm-up of two steps and a linear decay to a tenth at step 6; batches of 4 until 12 samples are consumed, then of 8.
RATES = [0.5, 1.0, 0.775, 0.55, 0.325, 0.1]
BATCHES = [BatchStep(0, 4), BatchStep(4, 4), BatchStep(8, 4), BatchStep(12, 8), BatchStep(20, 8), BatchStep(28, 8)]


def launched(loss: float) -> LaunchedStep:
    """A step with this loss."""
    return LaunchedStep(torch.tensor([loss]), lambda figures: StepResult(figures[0], 1.0, 1.0, False, 1.0, {}))


@dataclass
class Recorded:
    """An engine, a source, an observer and a callback that remember what they are given."""

    moments: list[str] = field(default_factory=list)
    rewinds_at: int = 0
    steps: list[tuple[list[str], BatchStep, float]] = field(default_factory=list)
    records: list[StepRecord] = field(default_factory=list)

    def launch_step(
        self, batches: list[str], step: BatchStep, learning_rate: float, *, measure_update: bool
    ) -> LaunchedStep:
        self.steps.append((batches, step, learning_rate))
        return launched(float(len(self.steps)))

    def training(self, batch: BatchStep) -> list[str]:
        return [f"samples from {batch.first_sample}"]

    skips: Skips = field(default_factory=Skips)

    def leave_out(self, skips: Skips) -> None:
        self.skips = skips

    def observe(self, record: StepRecord) -> Findings:
        self.moments.append(f"observe {record.step}")
        return Findings(spike=record.step == self.rewinds_at, ideal_bubble=0.0, shares={})

    def before_step(self, trainer: Trainer, step: int) -> None:
        self.moments.append(f"before {step}")

    def after_step(self, trainer: Trainer, record: StepRecord, findings: Findings) -> None:
        self.records.append(record)
        self.moments.append(f"after {record.step}")
        if findings.spike:
            self.rewinds_at = 0
            trainer.rewind(1, 4, self._find_skips)

    def at_end(self, trainer: Trainer) -> None:
        self.moments.append(f"end {trainer.finished_step}")

    def _find_skips(self) -> Skips:
        return Skips([Window(4, 8)])


OPTIMIZER = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=2, decay=Decay.linear)


def trainer_of(
    seen: Any,
    train: TrainConfig,
    origin: Origin,
    callbacks: list[Any] | None = None,
    optimizer: OptimizerConfig = OPTIMIZER,
    at_boundary: Callable[[], None] = lambda: None,
    **reading: bool,
) -> Trainer:
    """With a warm-up of two steps and a linear decay."""
    agreement: Any = SimpleNamespace(at_boundary=at_boundary)
    config, schedule = resolve(RunConfig(optimizer=optimizer, train=train)), BatchSchedule(train, origin)
    watching = [seen] if callbacks is None else callbacks
    return Trainer(
        config, seen, seen, schedule, agreement, seen, watching, origin.step, lambda _: 6, Heartbeat(), **reading
    )


def test_callbacks_have_named_moments_and_a_rewind_ends_those_of_its_step() -> None:
    seen, behind = Recorded(rewinds_at=3), Recorded()
    trainer_of(seen, TrainConfig(steps=6, global_batch_size=4), BEGINNING, [seen, behind]).fit()
    once = [[f"before {step}", f"observe {step}", f"after {step}"] for step in (1, 2, 3, 2, 3, 4, 5, 6)]
    assert seen.moments == [*(moment for step in once for moment in step), "end 6"]
    assert [record.step for record in behind.records] == [1, 2, 2, 3, 4, 5, 6]
    assert [record.batch.first_sample for record in behind.records] == [0, 4, 4, 8, 12, 16, 20]
    assert seen.skips.windows == Skips([Window(4, 8)]).windows


def test_figures_are_read_while_the_next_step_runs_unless_something_is_due() -> None:
    """A validation is due after step 3; step 6 is the last one."""
    seen = Recorded()
    train = TrainConfig(steps=6, global_batch_size=4, eval_interval=3, save_interval=0)
    trainer_of(seen, train, BEGINNING, reads_late=True).fit()
    order = "before 1, before 2, 1, before 3, 2, 3, before 4, before 5, 4, before 6, 5, 6"
    assert [moment for moment in seen.moments if "after" not in moment] == [
        moment if " " in moment else f"observe {moment}" for moment in order.split(", ")
    ] + ["end 6"]
    assert [(record.step, record.result.loss, record.newer) for record in seen.records] == [
        (1, 1.0, 1),
        (2, 2.0, 1),
        (3, 3.0, 0),
        (4, 4.0, 1),
        (5, 5.0, 1),
        (6, 6.0, 0),
    ]


def test_a_stop_request_leaves_no_step_unread() -> None:
    def stop_after_two_steps() -> None:
        if len(seen.steps) == 2:
            raise StopRequested(Reason.term, "")

    seen = Recorded()
    train = TrainConfig(steps=6, global_batch_size=4, eval_interval=0, save_interval=0)
    trainer = trainer_of(seen, train, BEGINNING, at_boundary=stop_after_two_steps, reads_late=True)
    with pytest.raises(StopRequested):
        trainer.fit()
    assert trainer.finished_step == 2
    assert [record.result.loss for record in seen.records] == [1.0, 2.0]


@dataclass
class Descent(Recorded):
    """Of x in (2 x)^2, from 1: it diverges while the learning rate is above 1/4."""

    largest: float = 0.0
    weight: float = 1.0

    def launch_step(
        self, batches: list[str], step: BatchStep, learning_rate: float, *, measure_update: bool
    ) -> LaunchedStep:
        loss = (2 * self.weight) ** 2
        self.weight -= learning_rate * 8 * self.weight
        return launched(loss if loss <= self.largest else math.inf)


@obeys("megatron_lite/train/callbacks.py:after_step")
def test_a_run_that_diverges() -> None:
    """By the largest number of the precision."""

    def train(precision: Precision = Precision.fp16, **optimizer: Any) -> None:
        largest = 65504.0 if precision is Precision.fp16 else 3.4e38
        seen: Any = Descent(largest=largest)
        guard = Guard(validate=SimpleNamespace(found_finite=lambda step: False))  # type: ignore[arg-type]
        config = TrainConfig(steps=6, global_batch_size=4, max_non_finite_steps=2, precision=precision)
        trainer_of(seen, config, BEGINNING, [guard], replace(OPTIMIZER, **optimizer)).fit()

    remedies = (
        r"use a lower optimizer\.learning_rate, more optimizer\.warmup_steps or train\.precision=fp32 in a new "
        r"train\.run_dir"
    )
    with pytest.raises(DivergedError, match=remedies):
        train()
    train(learning_rate=0.2)
    train(warmup_steps=50, decay_steps=60)
    train(Precision.fp32)


@pytest.mark.parametrize("first_step", [0, 1, 4])
def test_each_step_has_its_own_samples_and_learning_rate(first_step: int) -> None:
    """From the first on, and where a resumed run begins."""
    train = TrainConfig(steps=6, global_batch_size=8, batch_ramp=BatchRampConfig(start=4, increment=4, samples=12))
    origin = Origin(first_step, BATCHES[first_step].first_sample) if first_step else BEGINNING
    seen: Any = Recorded()
    trainer_of(seen, train, origin).fit()
    assert [batches for batches, _, _ in seen.steps] == [
        [f"samples from {batch.first_sample}"] for batch in BATCHES[first_step:]
    ]
    assert [batch for _, batch, _ in seen.steps] == BATCHES[first_step:]
    assert [rate for _, _, rate in seen.steps] == pytest.approx(RATES[first_step:])
    assert [record.step for record in seen.records] == list(range(first_step + 1, 7))
    assert [record.batch for record in seen.records] == BATCHES[first_step:]
    assert [record.learning_rate for record in seen.records] == pytest.approx(RATES[first_step:])
