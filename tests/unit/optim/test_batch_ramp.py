"""The batch ramp against a step-by-step simulation."""

import pytest

from megatron_lite.config.schema import BatchRampConfig, TrainConfig
from megatron_lite.optim.batch_ramp import BEGINNING, BatchSchedule, Origin

RAMPS = [
    (4, 4, 96, 32),
    (16, 16, 1000, 64),
    (2, 2, 101, 16),  # shares that are no whole number of samples
    (8, 8, 20, 64),  # shares smaller than a batch: some sizes are skipped
    (8, 8, 0, 32),
    (32, 8, 100, 32),  # starts full
]


def schedule(start: int, increment: int, samples: int, full: int, origin: Origin = BEGINNING) -> BatchSchedule:
    ramp = BatchRampConfig(start=start, increment=increment, samples=samples)
    return BatchSchedule(TrainConfig(global_batch_size=full, batch_ramp=ramp), origin)


def simulated(
    start: int, increment: int, samples: int, full: int, num_steps: int, consumed: int = 0
) -> list[tuple[int, int]]:
    """Megatron's rule, one step after the other: the batch is a function of the samples consumed so far."""
    steps = []
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


@pytest.mark.parametrize(("start", "increment", "samples", "full"), RAMPS)
def test_follows_the_rule(start: int, increment: int, samples: int, full: int) -> None:
    ramp = schedule(start, increment, samples, full)
    expected = simulated(start, increment, samples, full, 120)
    assert [(ramp.at(s).first_sample, ramp.at(s).global_batch_size) for s in range(120)] == expected


def test_steps_cover_every_sample_once() -> None:
    ramp = schedule(4, 4, 500, 64)
    covered = [s for step in range(60) for s in range(ramp.at(step).first_sample, ramp.at(step + 1).first_sample)]
    assert covered == list(range(ramp.at(60).first_sample))


@pytest.mark.parametrize(("start", "increment", "samples", "full"), RAMPS)
def test_resumed_with_the_same_settings_it_goes_on_as_ever(start: int, increment: int, samples: int, full: int) -> None:
    """From every step, resumed from every fifth."""
    whole = schedule(start, increment, samples, full)
    for step in range(0, 80, 5):
        resumed = schedule(start, increment, samples, full, Origin(step, whole.at(step).first_sample))
        assert [resumed.at(later) for later in range(step, 100)] == [whole.at(later) for later in range(step, 100)]
        for limit in range(whole.at(step).first_sample, 2000, 7):
            assert resumed.steps_within(limit) == whole.steps_within(limit)


@pytest.mark.parametrize(("start", "increment", "samples", "full"), RAMPS)
def test_resumed_with_another_ramp_it_follows_that_from_its_sample(
    start: int, increment: int, samples: int, full: int
) -> None:
    resumed = schedule(start, increment, samples, full, Origin(7, 50))
    expected = simulated(start, increment, samples, full, 60, consumed=50)
    assert [(resumed.at(s).first_sample, resumed.at(s).global_batch_size) for s in range(7, 67)] == expected


def test_resumed_again_and_again_no_sample_is_read_twice_or_left_out() -> None:
    """Each checkpoint says how many samples its run has consumed."""
    origin, read = BEGINNING, list[int]()
    for full, steps in ((32, 5), (48, 3), (16, 4), (64, 1), (64, 2)):
        plan = schedule(16, 16, 100, full, origin)
        for step in range(origin.step, origin.step + steps):
            batch = plan.at(step)
            read += range(batch.first_sample, batch.first_sample + batch.global_batch_size)
        origin = Origin(origin.step + steps, len(read))
    assert read == list(range(len(read)))
    assert origin.step == 15


def test_steps_within_counts_from_the_origin() -> None:
    resumed = BatchSchedule(TrainConfig(global_batch_size=64), Origin(step=10, samples=320))
    assert [resumed.steps_within(samples) for samples in (0, 320, 383, 384, 320 + 640)] == [10, 10, 10, 11, 20]
    with pytest.raises(AssertionError):
        resumed.at(9)
