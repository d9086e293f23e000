"""Shares of sources: exact in every block, near in every stretch, and found without state."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_lite.data.blend import Blend, normalised, places_per_block
from megatron_lite.errors import ConfigError


def test_places_are_exact_and_sum_to_the_block() -> None:
    assert places_per_block([0.5, 0.3, 0.2], 10).tolist() == [5, 3, 2]
    assert places_per_block([1 / 3, 1 / 3, 1 / 3], 10).tolist() == [4, 3, 3]
    assert places_per_block([0.0, 1.0], 10).tolist() == [0, 10]


@pytest.mark.parametrize("weights", [(0.7, 0.2, 0.1), (0.999, 0.001), (0.25,) * 4, (0.0, 0.6, 0.4)])
def test_each_block_holds_exact_counts_and_each_source_its_samples_in_order(weights: tuple[float, ...]) -> None:
    block = 1000
    blend = Blend(weights, seed=1, block=block)
    drawn: dict[int, list[int]] = {source: [] for source in range(len(weights))}
    for index in range(3 * block):
        source, inner = blend(index)
        drawn[source].append(inner)
    for source, weight in enumerate(weights):
        assert len(drawn[source]) == 3 * round(weight * block)
        assert drawn[source] == list(range(len(drawn[source])))  # none left out, none twice


def test_short_stretches_keep_the_shares() -> None:
    weights = (0.6, 0.3, 0.1)
    blend = Blend(weights, seed=3)
    sources = np.array([blend(i)[0] for i in range(5000)])
    for source, weight in enumerate(weights):
        running = np.cumsum(sources == source) - weight * np.arange(1, 5001)
        assert np.abs(running).max() <= 3


def test_a_fresh_blend_gives_the_same_from_any_index() -> None:
    whole = [Blend((0.5, 0.5), seed=9, block=64)(i) for i in range(300)]
    resumed = Blend((0.5, 0.5), seed=9, block=64)
    assert [resumed(i) for i in reversed(range(300))] == whole[::-1]


def test_seeds_and_blocks_give_different_orders() -> None:
    blend = Blend((0.5, 0.5), seed=1, block=100)
    first, second = ([blend(b * 100 + i)[0] for i in range(100)] for b in (0, 1))
    other = Blend((0.5, 0.5), seed=2, block=100)
    assert first != second
    assert first != [other(i)[0] for i in range(100)]


def test_weights_are_normalised() -> None:
    assert normalised([2, 6], 2) == (0.25, 0.75)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"data\.weights=\[1\] has 1 entries for 2 sources; give one weight for each source"),
        ([1.0, -0.5], r"data\.weights=\[1, -0\.5\] must hold numbers that are 0 or more"),
        ([1.0, float("nan")], r"data\.weights=\[1, nan\] must hold numbers"),
        ([0.0, 0.0], r"data\.weights=\[0, 0\] sums to 0; give at least one source a positive weight"),
    ],
)
def test_wrong_weights(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        normalised(weights, 2)


def test_weight_below_the_resolution() -> None:
    with pytest.raises(ConfigError, match=r"data\.weights\[1\]=1e-07 of the blend is below its resolution of 1/65,536"):
        places_per_block([1 - 1e-7, 1e-7])
