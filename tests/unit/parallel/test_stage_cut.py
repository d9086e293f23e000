"""The cut of layers into stages against every possible cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_lite.parallel.stage_cut import LayerCosts, balanced_cut
from megatron_lite.parallel.topology import even_cut, stage_bounds


@st.composite
def costs(draw: Callable[..., list[int]]) -> LayerCosts:
    """At most eight layers of any cost on at most five stages; each stage holds no more micro-batches than the last."""
    layers = draw(st.integers(1, 8))
    stages = draw(st.integers(1, min(5, layers)))
    cost = st.integers(0, 300)
    several = st.lists(cost, min_size=layers, max_size=layers)
    held = draw(st.lists(st.integers(1, 5), min_size=stages, max_size=stages))
    return LayerCosts(
        work=draw(several),
        first_work=draw(cost),
        last_work=draw(cost),
        states=draw(several),
        activations=draw(several),
        first_memory=draw(cost),
        last_memory=draw(cost),
        micro_batches=sorted(held, reverse=True),
    )


def every_cut(layers: int, stages: int) -> Iterator[list[int]]:
    """Those with at least one layer on each stage between the first and the last."""
    for ends in combinations(range(layers + stages - 1), stages - 1):
        cut = [stop - start - 1 for start, stop in pairwise([-1, *ends, layers + stages - 1])]
        if 0 not in cut[1:-1]:
            yield cut


@settings(max_examples=400, deadline=None, derandomize=True)
@given(costs())
# The heavy layer fits only on the third stage, so the second one must take one from the first, which could hold it.
@example(LayerCosts([1, 1, 1], 0, 0, [0, 0, 0], [1, 1, 100], 0, 0, [3, 2, 1]))
@example(LayerCosts([1, 1, 1, 1], 0, 9, [0, 0, 0, 0], [9, 1, 1, 1], 0, 0, [4, 3, 2, 1]))
def test_no_cut_is_faster_and_none_as_fast_needs_less_memory(given_costs: LayerCosts) -> None:
    found = balanced_cut(given_costs)
    possible = list(every_cut(len(given_costs.work), given_costs.stages))
    assert found in possible
    work = {tuple(cut): given_costs.largest(given_costs.work_of, cut) for cut in possible}
    memory = {tuple(cut): given_costs.largest(given_costs.memory_of, cut) for cut in possible}
    allowed = min(work.values()) * 101 // 100
    assert work[tuple(found)] <= allowed
    fast = [cut for cut in work if work[cut] <= allowed]
    least = min(memory[cut] for cut in fast)
    assert memory[tuple(found)] == least
    assert work[tuple(found)] == min(work[cut] for cut in fast if memory[cut] == least)


def of_equal_layers(layers: int, stages: int, head: int = 0) -> LayerCosts:
    none = [0] * layers
    return LayerCosts([10] * layers, 0, head, none, none, 0, 0, [1] * stages)


@pytest.mark.parametrize(
    ("layers", "stages", "head", "cut"),
    [
        (6, 2, 0, [3, 3]),
        (6, 2, 18, [4, 2]),
        (6, 2, 109, [6, 0]),  # the head is more than all layers
        (24, 4, 20, [7, 7, 6, 4]),  # 6.5 layers on each stage are not to be had
        (12, 4, 0, [3, 3, 3, 3]),
        (1, 1, 50, [1]),
    ],
)
def test_cuts_by_hand(layers: int, stages: int, head: int, cut: list[int]) -> None:
    costs = of_equal_layers(layers, stages, head)
    found = balanced_cut(costs)
    assert sorted(found[:-1]) == sorted(cut[:-1])  # which of the stages of equal work comes first does not matter
    assert found[-1] == cut[-1]


def test_memory_decides_between_equally_fast_cuts() -> None:
    """Ten layers on four stages: two have three. The first stage holds four micro-batches, the last one one."""
    none = [0] * 10
    costs = LayerCosts([10] * 10, 0, 0, none, [1] * 10, 0, 0, [4, 3, 2, 1])
    assert balanced_cut(costs) == [2, 2, 3, 3]
    assert costs.largest(costs.memory_of, [2, 2, 3, 3]) == 8 < costs.largest(costs.memory_of, even_cut(10, 4)) == 12


def test_large_models_are_cut() -> None:
    assert balanced_cut(of_equal_layers(10_000, 10_000)) == [1] * 10_000
    assert balanced_cut(of_equal_layers(10_000, 100)) == [100] * 100


def test_bounds_in_the_layer_list() -> None:
    """An embedding of two entries, three layers of two entries, a head of three; the last start is that of the head."""
    starts, entries = [2, 4, 6, 8], 11
    assert stage_bounds(starts, entries, [3]) == [0, 11]
    assert stage_bounds(starts, entries, [1, 2]) == [0, 4, 11]
    assert stage_bounds(starts, entries, [0, 3, 0]) == [0, 2, 8, 11]
