"""Which samples each step consumes, with or without a batch ramp: a pure function of the step.

A run that is resumed with another batch size continues from the step and samples in its checkpoint.
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
    """Where a schedule begins: steps done and samples consumed so far."""

    step: int
    samples: int
    """Consumed samples; those that the run skips (data/samples/skips.py) do not count."""


BEGINNING = Origin(0, 0)


class BatchSchedule:
    """Batch sizes over the run: Megatron's `--rampup-batch-size`, expanded into stages.

    The ramp's samples are split evenly among its batch sizes `start, start + increment, ...` below the full batch. A
    size is used until the end of its share. A step that crosses the end still counts in full, and sizes whose share is
    already consumed are skipped. The first step that starts after `samples` samples, and all later ones, use the full
    batch.

    The size depends only on the samples consumed so far. So a schedule that begins at any step of another one with the
    same settings continues it exactly, and with other settings no sample is read twice or left out.

    Steps and samples count from 0; sizes are in sequences.

    Validation of the configuration has checked that the ramp leads from `start` to the full batch.

    Args:
        origin: of a resumed run, from its checkpoint; earlier steps are unknown.
    """

    def __init__(self, train: TrainConfig, origin: Origin = BEGINNING) -> None:
        self.stages = _stages(train.batch_ramp, train.global_batch_size, origin)
        self._first_steps = [stage.first_step for stage in self.stages]

    @property
    def first_step(self) -> int:
        """The first step after the origin."""
        return self.stages[0].first_step

    def at(self, step: int) -> BatchStep:
        assert step >= self.stages[0].first_step
        stage = self.stages[bisect.bisect_right(self._first_steps, step) - 1]
        first_sample = stage.first_sample + (step - stage.first_step) * stage.global_batch_size
        return BatchStep(first_sample, stage.global_batch_size)

    def steps_within(self, samples: int) -> int:
        """Number of whole steps that fit into this many samples, including the steps before the origin."""
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
