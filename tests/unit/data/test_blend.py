"""Shares of sources: exact for any sizes, at every moment, and found without state."""

from __future__ import annotations

from fractions import Fraction
from itertools import islice
from math import ceil, floor, log

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_lite.data.blend import Blend, normalised, shares_of
from megatron_lite.errors import ConfigError

BOUND = 3.5  # samples, proven in the module's docstring
sizes = st.integers(0, 40).map(lambda bits: 2**bits) | st.integers(1, 10**13)


def drawn_before(blend: Blend, source: int, index: int) -> int:
    """How many samples of a source lie before a global index, by halving: of a run of any length."""
    low, high = 0, index + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if blend.index_of(source, middle) < index else (low, middle)
    return low


MANY = 64  # sources


@settings(max_examples=60, deadline=None)
@given(
    st.lists(sizes, min_size=1, max_size=9) | st.lists(sizes, min_size=10, max_size=MANY),
    st.integers(0, 2**64 - 1),
    st.integers(0, 10**15),
)
def test_every_source_has_its_share_after_any_number_of_samples(weights: list[int], seed: int, far: int) -> None:
    blend = Blend(weights, seed)
    total = sum(weights)
    counts = [0] * len(weights)
    for index in range(60):
        source, inner = blend(index)
        assert inner == counts[source]  # none left out, none twice
        counts[source] += 1
        for count, weight in zip(counts, weights, strict=True):
            _assert_near(count, Fraction(weight * (index + 1), total), len(weights))
    late = [drawn_before(blend, source, far) for source in range(len(weights))]
    assert sum(late) == far
    for count, weight in zip(late, weights, strict=True):
        _assert_near(count, Fraction(weight * far, total), len(weights))


@pytest.mark.parametrize("worst", ["least", "most"])
def test_the_bound_holds_where_all_splits_err_alike(worst: str) -> None:
    """Each split gives a third away, the last but one a half, and the last nearly nothing; phases at their ends."""
    left, chain = 10**15, list[int]()
    for _ in range(12):
        chain.append(left // 3 + left // 10**4)
        left -= chain[-1]
    half = left // 2
    weights = [*chain, half + 7, half - left // 200, left - 2 * half - 7 + left // 200]
    source = len(weights) - 2
    blend = Blend(weights, seed=1)
    for split, is_left in blend._paths[source]:
        split.phase = split.size - 1 if is_left == (worst == "most") else 0
    generator = np.random.default_rng(0)
    found = []
    for index in generator.integers(0, 10**15, 4000).tolist():
        count = index
        for split, is_left in blend._paths[source]:
            dealt = split.dealt_left(count)
            count = dealt if is_left else count - dealt
        found.append(count - Fraction(index * weights[source], sum(weights)))
    assert 2.5 < max(map(abs, found)) < BOUND


def _assert_near(count: int, exact: Fraction, num_sources: int) -> None:
    assert abs(count - exact) < BOUND
    if num_sources <= 2:
        assert floor(exact) <= count <= ceil(exact)


@settings(max_examples=100, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=30), st.integers(0, 2**64 - 1), st.integers(0, 10**18))
def test_a_sample_and_its_number_are_inverse_and_cost_a_short_walk(weights: list[int], seed: int, index: int) -> None:
    blend = Blend(weights, seed)
    source, inner = blend(index)
    assert blend.index_of(source, inner) == index
    for source, share in enumerate(shares_of(weights)):
        assert len(blend._paths[source]) <= min(len(weights) - 1, log(1 / share) / log(3 / 2) + 1)


def test_the_smallest_source_is_drawn_when_its_turn_comes() -> None:
    """Sizes that no grid holds: 150 G and 1.2 M tokens, or a ratio of 1 to 10^9."""
    for weights in [(150 * 10**9, 1_200_000), normalised([1.0, 1e-9], 2), (3_200_400, 13)]:
        share = shares_of(weights)[1]
        blend = Blend(weights, seed=5)
        places = [blend.index_of(1, inner) for inner in range(200)]
        gaps = np.diff(places)
        assert set(gaps) <= {floor(1 / share), ceil(1 / share)}
        assert places[0] <= 1 / share


def test_a_fresh_blend_gives_the_same_from_any_index() -> None:
    whole = [Blend((1, 2, 3), seed=9)(i) for i in range(300)]
    resumed = Blend((1, 2, 3), seed=9)
    assert [resumed(i) for i in reversed(range(300))] == whole[::-1]


def test_seeds_give_different_orders_and_units_do_not() -> None:
    def order(weights: tuple[int | Fraction, ...], seed: int) -> list[int]:
        blend = Blend(weights, seed)
        return [blend(i)[0] for i in range(100)]

    assert len({tuple(order((3, 2, 2), seed)) for seed in range(20)}) > 5
    assert order((3, 2, 2), 1) == order((30, 20, 20), 1) == order(shares_of((3, 2, 2)), 1)


def test_sources_without_weight_are_never_drawn() -> None:
    blend = Blend((0, 3, 0, 1), seed=2)
    assert {source for source, _ in map(blend, range(50))} == {1, 3}
    assert [Blend((0, 7), seed=2)(i) for i in range(3)] == [(1, 0), (1, 1), (1, 2)]


def test_the_order_of_today() -> None:
    """Runs resume in it. Where it has to change, raise `blend.ORDER`: a resume then says so."""
    orders = ["".join(str(Blend(weights, 1234)(i)[0]) for i in range(24)) for weights in ((1, 1), (5, 3, 2))]
    assert orders == ["010101010101010101010101", "020101020102010102010201"]


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([2, 6], (Fraction(1, 4), Fraction(3, 4))),
        ([0.1, 0.2], (Fraction(1, 3), Fraction(2, 3))),  # as typed: no binary number is a tenth
        ([1.0, 1e-9], (Fraction(10**9, 10**9 + 1), Fraction(1, 10**9 + 1))),
        ([1e308, 1e308], (Fraction(1, 2), Fraction(1, 2))),
    ],
)
def test_weights_are_the_numbers_that_were_typed(weights: list[float], shares: tuple[Fraction, ...]) -> None:
    assert normalised(weights, 2) == shares


@given(st.lists(st.floats(0, allow_infinity=False, allow_nan=False), min_size=1, max_size=6))
def test_any_weights_make_a_blend(weights: list[float]) -> None:
    assume(any(weights))
    shares = normalised(weights, len(weights))
    assert sum(shares) == 1
    assert all(bool(share) == bool(weight) for share, weight in zip(shares, weights, strict=True))
    for source, inner in islice(map(Blend(shares, seed=1), range(10**6, 10**7, 10**6)), 5):
        assert shares[source] > 0
        assert inner >= 0


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"data\.weights=\[1\] has 1 entries for 2 sources; give one weight for each source"),
        ([1.0, -0.5], r"data\.weights=\[1, -0\.5\] must hold numbers >= 0"),
        ([1.0, float("nan")], r"data\.weights=\[1, nan\] must hold numbers"),
        ([0.0, 0.0], r"data\.weights=\[0, 0\] sums to 0; give at least one source a positive weight"),
    ],
)
def test_wrong_weights(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        normalised(weights, 2)
