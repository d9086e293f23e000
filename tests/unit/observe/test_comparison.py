"""Where two curves part."""

from __future__ import annotations

import math

import pytest

from megatron_lite.observe.comparison import Parting, abs_gap, relative_gap

BASE = {step: 5.0 - 0.1 * step for step in range(1, 11)}


def test_equal_curves_do_not_part() -> None:
    parting = Parting.of(BASE, BASE | {11: 1.0}, 1e-6)
    assert parting is not None
    assert (parting.steps, parting.first_different, parting.first_beyond, parting.last_step) == (10, None, None, 10)
    assert parting.largest_gap == 0


def test_the_last_bit_is_a_difference_and_the_tolerance_is_relative() -> None:
    other = BASE | {3: math.nextafter(BASE[3], 9), 5: BASE[5] * (1 + 2e-6), 7: BASE[7] + 0.5}
    parting = Parting.of(BASE, other, 1e-6)
    assert parting is not None
    assert (parting.first_different, parting.first_beyond) == (3, 5)
    assert parting.largest_gap == pytest.approx(0.5)
    assert parting.largest_gap_step == 7


def test_no_step_in_common() -> None:
    assert Parting.of({1: 1.0}, {2: 1.0}, 1e-6) is None


@pytest.mark.parametrize(
    ("first", "second", "gap"),
    [(math.nan, math.nan, 0.0), (math.inf, math.inf, 0.0), (math.nan, 1.0, math.inf), (math.inf, 1.0, math.inf),
     (math.inf, -math.inf, math.inf), (0.0, 0.0, 0.0)],
)  # fmt: skip
def test_non_finite_values(first: float, second: float, gap: float) -> None:
    assert abs_gap(first, second) == relative_gap(first, second) == gap
