"""Spike detection: a pure function of the previous steps, so every rank and every replay gets the same result.

The loss falls over time, quickly at first. So the detector does not test the loss itself but its deviation from the
median of the last few steps, in units of the robust standard deviation of such deviations over a longer window: 1.4826
x the median absolute deviation, which equals the standard deviation for a normal distribution (Hampel 1974; the window
of 128 steps is OLMo-core's, which uses 6 standard deviations of the loss itself). The gradient norm is tested in the
same way, on a logarithmic scale.

A single step with a gradient norm fifty times the usual one is not a spike: small batches of clean text have such
steps, clipping makes them harmless, and the loss does not react. It is a spike if the loss rises as well, or if the
next step also has such a gradient.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from statistics import median
from typing import Protocol

BASELINE_STEPS = 9  # the next step is compared with the median of this many steps
LEAST_SPREAD = 1e-9  # avoids a division by zero for a series that does not change at all
NORMAL = 1.4826  # standard deviation / median absolute deviation, for a normal distribution


class SpikeKind(StrEnum):
    """Why a step counts as a spike."""

    not_finite = "not_finite"  # loss or gradient norm is NaN or Inf
    loss = "loss"
    grad_norm = "grad_norm"
    loss_scale = "loss_scale"  # the loss scale of fp16 has collapsed


class SpikeLimits(Protocol):
    """The settings `stability.*`; config/stability.py explains their defaults."""

    window: int
    min_steps: int
    loss_deviations: float
    min_loss_rise: float
    grad_norm_deviations: float
    min_grad_norm_factor: float
    loss_scale_halvings: int


@dataclass(frozen=True)
class StepStatistics:
    """The figures of a step that the detector uses."""

    step: int
    loss: float
    grad_norm: float
    loss_scale: float = 1.0
    overflowed: bool = False
    """The gradient overflowed fp16 and the update was skipped: normal while the loss scale is being adjusted."""


@dataclass(frozen=True)
class Judgement:
    kinds: tuple[SpikeKind, ...] = ()
    usual_loss: float | None = None
    """Median of the last steps that were not spikes; None = too few steps so far."""
    loss_deviations: float | None = None
    usual_grad_norm: float | None = None
    grad_norm_deviations: float | None = None

    @property
    def is_spike(self) -> bool:
        return bool(self.kinds)


@dataclass
class _Series:
    """The latest values of one quantity without spikes, and how far each was from the median of those before it."""

    window: int
    min_steps: int
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=BASELINE_STEPS))
    departures: deque[float] = field(default_factory=deque)

    def add(self, value: float) -> None:
        if self.recent:
            self.departures.append(value - median(self.recent))
        if len(self.departures) > self.window:
            self.departures.popleft()
        self.recent.append(value)

    def compare(self, value: float) -> tuple[float | None, float | None]:
        """The usual value, and by how many robust deviations this value differs from it; None = too few steps."""
        if len(self.departures) < self.min_steps:
            return None, None
        usual, centre = median(self.recent), median(self.departures)
        spread = NORMAL * median(abs(one - centre) for one in self.departures)
        return usual, (value - usual - centre) / max(spread, LEAST_SPREAD)


class SpikeDetector:
    """Decides for each step of a run, in order, whether it is a spike."""

    def __init__(self, limits: SpikeLimits) -> None:
        self.limits = limits
        self._forget()

    def _forget(self) -> None:
        self._loss = _Series(self.limits.window, self.limits.min_steps)
        self._log_norm = _Series(self.limits.window, self.limits.min_steps)
        self._scales: deque[float] = deque(maxlen=self.limits.window)
        self._spikes_in_a_row = 0
        self._norm_was_high = False

    def judge(self, statistics: StepStatistics) -> Judgement:
        """Compare the step with the usual steps before it; does not change the history."""
        collapsed = (SpikeKind.loss_scale,) if self._has_collapsed(statistics.loss_scale) else ()
        if statistics.overflowed and math.isfinite(statistics.loss):
            return Judgement(collapsed)
        usual_loss, loss_deviations = self._loss.compare(statistics.loss)
        usual_log, norm_deviations = self._log_norm.compare(_log(statistics.grad_norm))
        usual_norm = None if usual_log is None else math.exp(usual_log)
        judgement = Judgement((), usual_loss, loss_deviations, usual_norm, norm_deviations)
        return replace(judgement, kinds=(*collapsed, *self._kinds(statistics, judgement)))

    def _kinds(self, statistics: StepStatistics, judgement: Judgement) -> Iterator[SpikeKind]:
        if not (math.isfinite(statistics.loss) and math.isfinite(statistics.grad_norm)):
            yield SpikeKind.not_finite
            return
        limit = self.limits.loss_deviations
        rise = statistics.loss - (judgement.usual_loss or 0.0)
        least_rise = self.limits.min_loss_rise * abs(judgement.usual_loss or 0.0)
        if _exceeds(judgement.loss_deviations, limit) and rise >= least_rise:
            yield SpikeKind.loss
        if self._is_high(statistics, judgement) and (
            self._norm_was_high or _exceeds(judgement.loss_deviations, limit / 2)
        ):
            yield SpikeKind.grad_norm

    def add(self, statistics: StepStatistics, judgement: Judgement) -> None:
        """Add a judged step to the history.

        Spikes are left out, so that the next step is compared with what was usual before the spike. After `min_steps`
        consecutive spikes the level has changed permanently, and the history starts over.
        """
        self._norm_was_high = self._is_high(statistics, judgement)
        if SpikeKind.loss_scale in judgement.kinds:
            self._scales.clear()  # the scale stays low for long, and the following steps must not count as collapses
        if judgement.is_spike:
            self._spikes_in_a_row += 1
            if self._spikes_in_a_row >= self.limits.min_steps:
                self._forget()
            return
        self._spikes_in_a_row = 0
        if statistics.overflowed:
            return
        self._loss.add(statistics.loss)
        self._log_norm.add(_log(statistics.grad_norm))
        self._scales.append(statistics.loss_scale)

    def replay(self, history: Iterable[StepStatistics]) -> None:
        """Start over with the steps of an earlier attempt."""
        self._forget()
        for statistics in history:
            self.add(statistics, self.judge(statistics))

    def _is_high(self, statistics: StepStatistics, judgement: Judgement) -> bool:
        usual = judgement.usual_grad_norm
        if usual is None or statistics.grad_norm < self.limits.min_grad_norm_factor * usual:
            return False
        return _exceeds(judgement.grad_norm_deviations, self.limits.grad_norm_deviations)

    def _has_collapsed(self, scale: float) -> bool:
        return bool(self._scales) and scale * 2**self.limits.loss_scale_halvings <= max(self._scales)


def _exceeds(deviations: float | None, limit: float) -> bool:
    """False for NaN, which is a spike of the kind `not_finite` instead."""
    return deviations is not None and deviations >= limit


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30)) if norm == norm else norm
