"""Draws follow their distributions, belong to their key, and never change between versions."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest

from megatron_lite.data.sampler import raw_bits
from megatron_lite.objectives.draws import Draws, poisson_table
from tests.unit.objectives.samples import fits


def test_draws_are_the_raw_bits_of_the_key_in_order() -> None:
    draws = Draws(99)
    bits = raw_bits(6, 99)
    assert draws.bits(2).tolist() == bits[:2].tolist()
    assert draws.uniform() == (int(bits[2]) >> 11) / 2**53
    assert draws.below(1000) == int(bits[3]) * 1000 >> 64
    assert draws.uniforms(2).tolist() == [(int(b) >> 11) / 2**53 for b in bits[4:]]


def test_draws_are_pinned() -> None:
    """These numbers decide the masks of every run: a change would make old runs unrepeatable."""
    draws = Draws(1234)
    assert draws.order(6).tolist() == [1, 0, 2, 5, 4, 3]
    assert draws.segments(20, 4).tolist() == [4, 4, 4, 8]
    assert draws.integers(np.array([10, 100, 1000])).tolist() == [5, 91, 107]
    assert draws.from_table(poisson_table(3.0), 8).tolist() == [2, 3, 3, 0, 4, 1, 1, 6]


def test_integers_are_uniform_and_stay_below_their_bounds() -> None:
    draws = Draws(1)
    values = draws.integers(np.full(100_000, 7))
    assert fits(np.bincount(values, minlength=7), np.full(7, 1 / 7))
    assert fits(np.bincount([draws.below(7) for _ in range(20_000)], minlength=7), np.full(7, 1 / 7))
    bounds = np.repeat([1, 2, 2**40], 1000)
    assert (draws.integers(bounds) < bounds).all()


def test_orders_are_equally_likely() -> None:
    seen = Counter(tuple(Draws(key).order(4).tolist()) for key in range(24_000))
    assert fits([seen[order] for order in permutations(range(4))], np.full(24, 1 / 24))


def test_choices_are_equally_likely() -> None:
    seen = Counter(tuple(np.flatnonzero(Draws(key).choose(2, 5)).tolist()) for key in range(10_000))
    assert fits([seen[pair] for pair in combinations(range(5), 2)], np.full(10, 1 / 10))
    assert [int(Draws(0).choose(count, 5).sum()) for count in range(6)] == list(range(6))
    assert len(Draws(0).choose(0, 0)) == 0


def test_segments_are_equally_likely() -> None:
    seen = Counter(tuple(Draws(key).segments(6, 3).tolist()) for key in range(20_000))
    assert len(seen) == math.comb(5, 2)
    assert all(sum(lengths) == 6 and min(lengths) > 0 for lengths in seen)
    assert fits(list(seen.values()), np.full(10, 1 / 10))


def test_segments_at_their_limits() -> None:
    assert Draws(0).segments(1, 1).tolist() == [1]
    assert Draws(0).segments(5, 1).tolist() == [5]
    assert Draws(0).segments(5, 5).tolist() == [1] * 5


@pytest.mark.parametrize("mean", [0.2, 3.0, 20.0])
def test_poisson_has_its_mean_and_variance(mean: float) -> None:
    values = Draws(5).from_table(poisson_table(mean), 200_000)
    assert abs(values.mean() - mean) < 5 * math.sqrt(mean / len(values))
    assert abs(values.var() / mean - 1) < 0.03
    assert abs((values == 0).mean() - math.exp(-mean)) < 0.005


@pytest.mark.parametrize("mean", [1e-3, 3.0, 1000.0])
def test_poisson_table_ascends_to_one(mean: float) -> None:
    table = poisson_table(mean)
    assert table[-1] == 1
    assert (np.diff(table) >= 0).all()
    assert abs(table[-2] - 1) < 1e-9  # nothing is left for the last value
