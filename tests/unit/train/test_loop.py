"""Which samples and which learning rate each step of a run gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lite.config.schema import BatchRampConfig, Decay, OptimizerConfig, RunConfig, TrainConfig
from megatron_lite.engine.engine import StepResult
from megatron_lite.optim.batch_ramp import BEGINNING, BatchSchedule, BatchStep, Origin
from megatron_lite.train.loop import StepRecord, Trainer

# A warm-up of two steps and a linear decay to a tenth at step 6; batches of 4 until 12 samples are consumed, then of 8.
RATES = [0.5, 1.0, 0.775, 0.55, 0.325, 0.1]
BATCHES = [BatchStep(0, 4), BatchStep(4, 4), BatchStep(8, 4), BatchStep(12, 8), BatchStep(20, 8), BatchStep(28, 8)]


@dataclass
class Recorded:
    """An engine, a source and a callback that remember what they are given."""

    steps: list[tuple[list[str], BatchStep, float]] = field(default_factory=list)
    records: list[StepRecord] = field(default_factory=list)

    def train_step(
        self, batches: list[str], step: BatchStep, learning_rate: float, *, measure_update: bool
    ) -> StepResult:
        self.steps.append((batches, step, learning_rate))
        return StepResult(1.0, 1.0, 1.0, False, 1.0, {})

    def training(self, batch: BatchStep) -> list[str]:
        return [f"samples from {batch.first_sample}"]

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        self.records.append(record)


@pytest.mark.parametrize("first_step", [0, 1, 4])
def test_each_step_has_its_own_samples_and_learning_rate(first_step: int) -> None:
    """From the first on, and where a resumed run begins."""
    optimizer = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=2, decay=Decay.linear)
    train = TrainConfig(steps=6, global_batch_size=8, batch_ramp=BatchRampConfig(start=4, increment=4, samples=12))
    origin = Origin(first_step, BATCHES[first_step].first_sample) if first_step else BEGINNING
    seen: Any = Recorded()
    agreement: Any = SimpleNamespace(at_boundary=lambda: None)
    config = RunConfig(optimizer=optimizer, train=train)
    Trainer(config, seen, seen, BatchSchedule(train, origin), agreement, [seen], first_step, 6).fit()
    assert [batches for batches, _, _ in seen.steps] == [
        [f"samples from {batch.first_sample}"] for batch in BATCHES[first_step:]
    ]
    assert [batch for _, batch, _ in seen.steps] == BATCHES[first_step:]
    assert [rate for _, _, rate in seen.steps] == pytest.approx(RATES[first_step:])
    assert [record.step for record in seen.records] == list(range(first_step + 1, 7))
    assert [record.batch for record in seen.records] == BATCHES[first_step:]
    assert [record.learning_rate for record in seen.records] == pytest.approx(RATES[first_step:])
