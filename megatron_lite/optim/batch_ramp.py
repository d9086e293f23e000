"""Which samples each step consumes, with or without a growing batch: a pure function of the step.

A run that is resumed with another batch size counts from where its checkpoint says that it was.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from megatron_lite.config.schema import BatchRampConfig, TrainConfig


@dataclass(frozen=True)
class BatchStep:
    """The samples [first_sample, first_sample + global_batch_size) of one step, counted as they are consumed."""

    first_sample: int
    global_batch_size: int


@dataclass(frozen=True)
class BatchStage:
    """Consecutive steps with one batch size."""

    first_step: int
    first_sample: int
    global_batch_size: int


@dataclass(frozen=True)
class Origin:
    """Where a schedule begins: so many steps are made, and so many samples consumed."""

    step: int
    samples: int
    """Consumed: those that the run leaves out (data/samples/skips.py) do not count."""


BEGINNING = Origin(0, 0)


class BatchSchedule:
    """Batch sizes over the run: the ramp of `--rampup-batch-size` in Megatron, unrolled into stages.

    The ramp's samples are split evenly among its batch sizes `start, start + increment, ...` below the full
    batch. A size is used while fewer samples than its share's end are consumed, so a step that crosses the end
    still counts whole, and sizes whose share was already consumed are left out. The first step that starts
    after `samples` samples, and all later ones, use the full batch.

    The size is a function of the samples consumed so far alone. So a schedule that begins at any step of another one,
    with the same settings, goes on as that one; and with other settings nothing is read twice or left out.

    Steps and samples count from 0; sizes are in sequences.

    The validation of the configuration has seen that the ramp leads from `start` to the full batch.

    Args:
        origin: of a resumed run, what its checkpoint says; earlier steps are unknown.
    """

    def __init__(self, train: TrainConfig, origin: Origin = BEGINNING) -> None:
        self.stages = _stages(train.batch_ramp, train.global_batch_size, origin)
        self._first_steps = [stage.first_step for stage in self.stages]

    @property
    def first_step(self) -> int:
        """Of the origin."""
        return self.stages[0].first_step

    def at(self, step: int) -> BatchStep:
        assert step >= self.stages[0].first_step
        stage = self.stages[bisect.bisect_right(self._first_steps, step) - 1]
        first_sample = stage.first_sample + (step - stage.first_step) * stage.global_batch_size
        return BatchStep(first_sample, stage.global_batch_size)

    def steps_within(self, samples: int) -> int:
        """Whole steps that need no more than so many samples, those before the origin included."""
        samples = max(samples, self.stages[0].first_sample)
        stage = self.stages[bisect.bisect_right([stage.first_sample for stage in self.stages], samples) - 1]
        return stage.first_step + (samples - stage.first_sample) // stage.global_batch_size


def _stages(ramp: BatchRampConfig, global_batch_size: int, origin: Origin) -> list[BatchStage]:
    stages: list[BatchStage] = []
    step, sample = origin.step, origin.samples
    if ramp.start:
        num_increments = (global_batch_size - ramp.start) // ramp.increment
        for index in range(num_increments):
            share_end = -(-ramp.samples * (index + 1) // num_increments)
            if sample >= share_end:
                continue
            size = ramp.start + index * ramp.increment
            stages.append(BatchStage(step, sample, size))
            num_steps = -(-(share_end - sample) // size)
            step += num_steps
            sample += num_steps * size
    stages.append(BatchStage(step, sample, global_batch_size))
    return stages
