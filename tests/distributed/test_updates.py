"""How clipped steps change the weights, with an optimizer whose updates depend on the size of the gradient.

Adam's updates hardly change if all gradients are 5 % larger, so a wrong clip coefficient would not show in the loss.
SGD's do change: they are compared with those of one rank without DeepSpeed, for every way in which DeepSpeed clips.
"""

from __future__ import annotations

import pytest

from megatron_lite.config.schema import Precision
from tests.distributed.equivalence_cases import (
    UPDATE_CASES,
    UPDATE_TOLERANCES,
    compared_updates,
    update_traces,
    update_twin,
)


@pytest.mark.parametrize(("layout", "precision"), UPDATE_CASES)
def test_clipped_steps_change_the_weights_as_one_rank_does(layout: str, precision: Precision) -> None:
    found = compared_updates([right for right, _ in update_traces()[layout, precision]])
    assert found.keys() == {f"update of {name}" for name in update_twin().updates}
    what, difference = next(iter(found.items()))
    assert difference <= UPDATE_TOLERANCES[precision], f"{what} differs by {difference:.1e}"


@pytest.mark.parametrize(("layout", "precision"), UPDATE_CASES)
def test_clip_coefficient_off_by_five_percent_is_caught(layout: str, precision: Precision) -> None:
    what, difference = next(iter(compared_updates([wrong for _, wrong in update_traces()[layout, precision]]).items()))
    assert difference > 1.5 * UPDATE_TOLERANCES[precision], f"went unnoticed: {what} differs by {difference:.1e}"
