"""What counts as a spike: on made-up curves whose noise, trend and faults are known."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from megatron_lite.config.stability import StabilityConfig
from megatron_lite.observe.spikes import Judgement, SpikeDetector, SpikeKind, StepStatistics

LIMITS = StabilityConfig()


def curve(
    seed: int, steps: int = 400, noise: float = 0.05, start: float = 8.0, end: float = 3.0
) -> Iterator[StepStatistics]:
    """A loss that falls as losses do, and a gradient norm whose logarithm has heavy tails."""
    random = np.random.default_rng(seed)
    for step in range(1, steps + 1):
        loss = end + (start - end) * math.exp(-step / 60) + noise * random.standard_normal()
        norm = (5 * math.exp(-step / 20) + 0.8) * math.exp(0.2 * random.standard_t(4))
        yield StepStatistics(step, loss, norm)


def run(detector: SpikeDetector, steps: list[StepStatistics]) -> dict[int, Judgement]:
    """The spikes."""
    found = {}
    for statistics in steps:
        judgement = detector.judge(statistics)
        detector.add(statistics, judgement)
        if judgement.is_spike:
            found[statistics.step] = judgement
    return found


def changed(steps: list[StepStatistics], at: dict[int, dict[str, float]]) -> list[StepStatistics]:
    return [replace(statistics, **at.get(statistics.step, {})) for statistics in steps]


@pytest.mark.parametrize("seed", range(30))
def test_no_false_alarm(seed: int) -> None:
    assert run(SpikeDetector(LIMITS), list(curve(seed))) == {}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("step", [25, 60, 300])
def test_a_rise_of_the_loss(seed: int, step: int) -> None:
    """Early too, where the loss still falls by more in a few steps than the spike rises."""
    steps = list(curve(seed))
    found = run(SpikeDetector(LIMITS), changed(steps, {step: {"loss": steps[step - 1].loss + 1.2}}))
    assert list(found) == [step]
    assert found[step].kinds == (SpikeKind.loss,)
    assert found[step].usual_loss == pytest.approx(steps[step - 1].loss, abs=0.5)


def test_deviations_are_robust_ones() -> None:
    """By numpy, of a flat series: 1.4826 x the median absolute deviation of departures from the median of nine."""
    random = np.random.default_rng(0)
    losses = (5 + 0.1 * random.standard_normal(200)).tolist()
    detector = SpikeDetector(LIMITS)
    run(detector, [StepStatistics(step, loss, 1.0) for step, loss in enumerate(losses, 1)])
    departures = [losses[i] - np.median(losses[max(0, i - 9) : i]) for i in range(1, len(losses))][-LIMITS.window :]
    centre = np.median(departures)
    spread = 1.4826 * np.median(np.abs(np.array(departures) - centre))
    judgement = detector.judge(StepStatistics(201, 7.0, 1.0))
    assert judgement.usual_loss == np.median(losses[-9:])
    assert judgement.loss_deviations == pytest.approx((7.0 - np.median(losses[-9:]) - centre) / spread)


def test_a_tiny_bump_of_a_constant_series_is_no_spike() -> None:
    steps = [StepStatistics(step, 3.0 + 1e-4 * (step % 3), 1.0) for step in range(1, 100)]
    assert run(SpikeDetector(LIMITS), changed(steps, {80: {"loss": 3.05}})) == {}
    assert list(run(SpikeDetector(LIMITS), changed(steps, {80: {"loss": 3.2}}))) == [80]


def test_one_high_gradient_norm_is_no_spike_and_two_are() -> None:
    steps = list(curve(1))
    assert run(SpikeDetector(LIMITS), changed(steps, {200: {"grad_norm": 60.0}})) == {}
    found = run(SpikeDetector(LIMITS), changed(steps, {200: {"grad_norm": 60.0}, 201: {"grad_norm": 80.0}}))
    assert {step: judgement.kinds for step, judgement in found.items()} == {201: (SpikeKind.grad_norm,)}


def test_one_high_gradient_with_a_loss_that_rises() -> None:
    steps = list(curve(2, noise=0.05))
    rise = {"loss": steps[199].loss + 0.35, "grad_norm": 60.0}
    assert [judgement.kinds for judgement in run(SpikeDetector(LIMITS), changed(steps, {200: rise})).values()] == [
        (SpikeKind.grad_norm,)
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_non_finite_values_from_the_first_step_on(name: str, value: float) -> None:
    steps = list(curve(3, steps=60))
    found = run(SpikeDetector(LIMITS), changed(steps, {1: {name: value}, 50: {name: value}}))
    assert {step: judgement.kinds for step, judgement in found.items()} == {
        1: (SpikeKind.not_finite,),
        50: (SpikeKind.not_finite,),
    }


def test_an_overflow_of_fp16_is_a_part_of_its_search() -> None:
    steps = list(curve(4, steps=60))
    overflow = {"grad_norm": math.inf, "overflowed": True}
    assert run(SpikeDetector(LIMITS), changed(steps, {1: overflow, 2: overflow, 40: overflow})) == {}
    broken = {**overflow, "loss": math.nan}
    assert list(run(SpikeDetector(LIMITS), changed(steps, {40: broken}))) == [40]


def test_collapse_of_the_loss_scale() -> None:
    """The first search for a scale does not count: nothing has been trained with those."""
    overflow = {"grad_norm": math.inf, "overflowed": True}
    search = {step: {**overflow, "loss_scale": 2.0 ** (32 - step)} for step in range(1, 17)}
    steady = {step: {"loss_scale": 2.0**16} for step in range(17, 100)}
    fall = {step: {**overflow, "loss_scale": 2.0 ** (116 - step)} for step in range(100, 107)}
    found = run(SpikeDetector(LIMITS), changed(list(curve(5, steps=106)), search | steady | fall))
    assert {step: judgement.kinds for step, judgement in found.items()} == {106: (SpikeKind.loss_scale,)}


def test_a_collapsed_loss_scale_is_reported_once() -> None:
    """It stays low for long, and the steps after it are as good as any."""
    low = {step: {"loss_scale": 2.0**8} for step in range(60, 120)}
    lower = {step: {"loss_scale": 2.0**2} for step in range(120, 200)}
    steps = [replace(statistics, loss_scale=2.0**16) for statistics in curve(5, steps=199)]
    assert list(run(SpikeDetector(LIMITS), changed(steps, low | lower))) == [60, 120]


def test_a_new_level_is_usual_after_a_while() -> None:
    steps = [StepStatistics(step, 3.0 + 0.01 * (step % 5), 1.0) for step in range(1, 200)]
    higher = {step: {"loss": 4.0 + 0.01 * (step % 5)} for step in range(100, 200)}
    found = run(SpikeDetector(LIMITS), changed(steps, higher))
    assert list(found) == list(range(100, 100 + LIMITS.min_steps))


@pytest.mark.parametrize("resumed", [50, 120, 299])
def test_a_resumed_run_judges_as_one_that_never_stopped(resumed: int) -> None:
    steps = list(curve(6))
    steps = changed(steps, {100: {"loss": 9.0}, 300: {"loss": steps[299].loss + 1}})
    unbroken, second = SpikeDetector(LIMITS), SpikeDetector(LIMITS)
    run(unbroken, steps[:resumed])
    second.replay(steps[max(0, resumed - 2 * LIMITS.window - 20) : resumed])
    assert run(second, steps[resumed:]) == run(unbroken, steps[resumed:])
