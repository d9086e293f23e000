"""The batch ramp against a step-by-step simulation."""

import pytest

from megatron_lite.config.schema import BatchRampConfig, TrainConfig
from megatron_lite.optim.batch_ramp import BatchSchedule


def schedule(start: int, increment: int, samples: int, full: int) -> BatchSchedule:
    ramp = BatchRampConfig(start=start, increment=increment, samples=samples)
    return BatchSchedule(TrainConfig(global_batch_size=full, batch_ramp=ramp))


def simulated(start: int, increment: int, samples: int, full: int, num_steps: int) -> list[tuple[int, int]]:
    """Megatron's rule, one step after the other: the batch is a function of the samples consumed so far."""
    consumed, steps = 0, []
    num_increments = (full - start) // increment
    for _ in range(num_steps):
        if num_increments == 0 or samples == 0 or consumed >= samples:
            size = full
        else:
            size = start + increment * int(consumed * num_increments / samples)
        steps.append((consumed, size))
        consumed += size
    return steps


def test_without_a_ramp() -> None:
    plain = BatchSchedule(TrainConfig(global_batch_size=32))
    assert [(plain.at(s).first_sample, plain.at(s).global_batch_size) for s in (0, 1, 1000)] == [
        (0, 32),
        (32, 32),
        (32000, 32),
    ]


@pytest.mark.parametrize(
    ("start", "increment", "samples", "full"),
    [
        (4, 4, 96, 32),
        (16, 16, 1000, 64),
        (2, 2, 101, 16),  # shares that are no whole number of samples
        (8, 8, 20, 64),  # shares smaller than a batch: some sizes are skipped
        (8, 8, 0, 32),
        (32, 8, 100, 32),  # starts full
    ],
)
def test_follows_the_rule(start: int, increment: int, samples: int, full: int) -> None:
    ramp = schedule(start, increment, samples, full)
    expected = simulated(start, increment, samples, full, 120)
    assert [(ramp.at(s).first_sample, ramp.at(s).global_batch_size) for s in range(120)] == expected


def test_steps_cover_every_sample_once() -> None:
    ramp = schedule(4, 4, 500, 64)
    covered = [s for step in range(60) for s in range(ramp.at(step).first_sample, ramp.at(step + 1).first_sample)]
    assert covered == list(range(ramp.at(60).first_sample))
