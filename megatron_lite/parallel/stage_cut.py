"""Cuts a row of transformer layers into pipeline stages by cost. Pure arithmetic on integers: every rank, and the plan
before any rank starts, gets the same cut.

A pipeline is as fast as its slowest stage. So the largest work of a stage is the least that is possible. Among cuts
within 1 % of it, the one whose largest stage needs the least memory is taken; what freedom is left evens out the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, pairwise

WORK_TOLERANCE_PERCENT = 1
"""How much more than the least work the largest stage may do, to save memory."""


@dataclass(frozen=True)
class LayerCosts:
    """What a cut is judged by. Costs are integers in units of the caller's choice.

    A stage holds neighbouring layers. The first stage also holds the embedding, the last one the head; these two may
    have no layers.
    """

    work: Sequence[int]
    """Of each layer, in order."""
    first_work: int
    """Of what the first stage holds before its layers; `last_work` of what the last one holds after its layers."""
    last_work: int
    states: Sequence[int]
    """Memory of each layer that every stage needs once."""
    activations: Sequence[int]
    """Memory of each layer for each micro-batch that its stage holds."""
    first_memory: int
    last_memory: int
    micro_batches: Sequence[int]
    """How many micro-batches each stage holds at once; no stage more than the stage before it."""

    @property
    def stages(self) -> int:
        return len(self.micro_batches)

    def work_of(self, stage: int, start: int, stop: int) -> int:
        """Of a stage that holds the layers [start, stop)."""
        return self._sums[0][stop] - self._sums[0][start] + self._ends(stage, self.first_work, self.last_work)

    def memory_of(self, stage: int, start: int, stop: int) -> int:
        """Of a stage that holds the layers [start, stop)."""
        _, states, activations = self._sums
        held = self.micro_batches[stage] * (activations[stop] - activations[start])
        return states[stop] - states[start] + held + self._ends(stage, self.first_memory, self.last_memory)

    def largest(self, cost: Callable[[int, int, int], int], cut: Sequence[int]) -> int:
        """The largest cost (`work_of` or `memory_of`) of a stage of this cut."""
        return max(cost(stage, *bounds) for stage, bounds in enumerate(pairwise([0, *accumulate(cut)])))

    @cached_property
    def _sums(self) -> tuple[list[int], list[int], list[int]]:
        """Of all layers before each one: work, states, activations."""
        work, states, activations = ([0, *accumulate(part)] for part in (self.work, self.states, self.activations))
        return work, states, activations

    def _ends(self, stage: int, first: int, last: int) -> int:
        return (first if stage == 0 else 0) + (last if stage == self.stages - 1 else 0)


def balanced_cut(costs: LayerCosts) -> list[int]:
    """Number of layers of each stage. At least one for each stage between the first and the last.

    There are at least as many layers as stages.
    """
    no_work_limit = sum(costs.work) + costs.first_work + costs.last_work
    no_memory_limit = (
        sum(costs.states) + costs.micro_batches[0] * sum(costs.activations) + costs.first_memory + costs.last_memory
    )
    least_work = _least(lambda limit: _latest_ends(costs, limit, no_memory_limit) is not None, no_work_limit)
    allowed = least_work * (100 + WORK_TOLERANCE_PERCENT) // 100
    memory = _least(lambda limit: _latest_ends(costs, allowed, limit) is not None, no_memory_limit)
    work = _least(lambda limit: _latest_ends(costs, limit, memory) is not None, allowed)
    ends = _latest_ends(costs, work, memory)
    assert ends is not None, "the limits were just met"
    bounds = _evened_out(costs, [0, *ends], work, memory)
    return [stop - start for start, stop in pairwise(bounds)]


def _least(is_possible: Callable[[int], bool], possible: int) -> int:
    """The least limit that is possible; a larger limit than a possible one is possible, too."""
    impossible = -1
    while possible - impossible > 1:
        middle = (possible + impossible) // 2
        if is_possible(middle):
            possible = middle
        else:
            impossible = middle
    return possible


def _latest_ends(costs: LayerCosts, work: int, memory: int) -> list[int] | None:
    """Where the stages end if each takes as many layers as these limits allow; None if no cut meets them.

    Taking more never hurts the stages that follow: fewer layers are left for them. A stage in the middle that would
    stay empty gets a layer from those before it, which fits: it needs no more there than here.
    """
    count, last = len(costs.work), costs.stages - 1

    def fits(stage: int, start: int, stop: int) -> bool:
        return costs.work_of(stage, start, stop) <= work and costs.memory_of(stage, start, stop) <= memory

    ends, start = [], 0
    for stage in range(last):
        if not fits(stage, start, start):
            return None
        most = count - (last - 1 - stage)  # one for each stage in the middle that follows
        start = _last_that_fits(partial(fits, stage, start), start, most)
        if start < stage:
            return None  # too few layers to give one to each stage so far
        ends.append(start)
    for stage in range(last - 2, -1, -1):
        ends[stage] = min(ends[stage], ends[stage + 1] - 1)
    return [*ends, count] if fits(last, start, count) else None


def _last_that_fits(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The last of [low, high] that fits; `low` does, and nothing fits after one that does not."""
    reach = 1
    while low + reach <= high and fits(low + reach):
        low += reach
        reach *= 2
    high = min(high, low + reach - 1)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _evened_out(costs: LayerCosts, bounds: list[int], work: int, memory: int) -> list[int]:
    """Moves single layers between neighbours while that evens out their work and keeps the limits."""
    moved = True
    while moved:
        moved = False
        for inner in range(1, len(bounds) - 1):
            for step in (-1, 1):
                before = _squares(costs, bounds, inner)
                bounds[inner] += step
                if _is_allowed(costs, bounds, inner, work, memory) and _squares(costs, bounds, inner) < before:
                    moved = True
                else:
                    bounds[inner] -= step
    return bounds


def _is_allowed(costs: LayerCosts, bounds: Sequence[int], inner: int, work: int, memory: int) -> bool:
    """Whether the two stages beside a bound have the layers that they need, and keep the limits."""
    beside = [(stage, bounds[stage], bounds[stage + 1]) for stage in (inner - 1, inner)]
    if any(stop - start < (0 < stage < costs.stages - 1) for stage, start, stop in beside):
        return False
    return all(costs.work_of(*one) <= work and costs.memory_of(*one) <= memory for one in beside)


def _squares(costs: LayerCosts, bounds: Sequence[int], inner: int) -> int:
    """Sum of squares of the work of the two stages beside a bound: the less, the more even."""
    return sum(costs.work_of(stage, bounds[stage], bounds[stage + 1]) ** 2 for stage in (inner - 1, inner))
