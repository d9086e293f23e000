"""Sums of squares are exact whatever the sizes and however far apart the elements are."""

from __future__ import annotations

import pytest
import torch

from megatron_lite.engine.gradient_norms import ROW, sum_of_squares


@pytest.mark.parametrize("size", [0, 1, ROW - 1, ROW, 3 * ROW + 1])
def test_every_element_counts_once(size: int) -> None:
    assert float(sum_of_squares(torch.full((size,), 2.0))) == pytest.approx(4.0 * size, rel=1e-6)


def test_small_elements_are_not_lost_among_large_ones() -> None:
    gradient = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0)) * 1e-5
    gradient[::997] *= 3e3
    exact = float(gradient.double().square().sum())
    assert float(torch.linalg.vector_norm(gradient)) ** 2 != pytest.approx(exact, rel=1e-5), "the case is too easy"
    assert float(sum_of_squares(gradient)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_non_finite_element(value: float) -> None:
    gradient = torch.ones(2 * ROW)
    gradient[700] = value
    assert not torch.isfinite(sum_of_squares(gradient))
