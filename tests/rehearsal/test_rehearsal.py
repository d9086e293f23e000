"""Every case of the rehearsal: it runs to its end on the fake GPU and costs no more than the table allows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from tests.rehearsal import budget
from tests.rehearsal.cases import config_of, rank_of, read_cases
from tests.rehearsal.faults import FAULTS
from tests.rehearsal.layers import LAYERS, layer_config
from tests.rehearsal.record import Recording
from tests.rehearsal.warm import Rehearsals, Request

CASES = read_cases()
FAULT_CASE = "gpt2-prefix_lm-zero1-bf16-tp2-dp2"
"""The case into which faults are planted: masks, two groups, an optimizer that is partitioned."""
TABLE = budget.read()


@pytest.fixture(scope="module")
def measured() -> Iterator[dict[str, dict[str, dict[str, float]]]]:
    """Figures by section of the table and name; written to it at the end if that is wanted."""
    found: dict[str, dict[str, dict[str, float]]] = {"cases": {}, "layers": {}}
    yield found
    if budget.rewriting():
        for section, rows in found.items():
            budget.write(section, rows)


def _recorded(rehearsals: Rehearsals, name: str, fault: str | None = None, acts: tuple[str, ...] = ()) -> Recording:
    config = config_of(CASES[name])
    return rehearsals.run(Request(config, rank_of(CASES[name], config), acts, fault))


def _hold(section: str, name: str, figures: dict[str, float], explanation: str = "") -> None:
    """
    Raises:
        AssertionError: a figure exceeds the table.
    """
    assert name in TABLE[section], f"budget.yaml has no row {name!r}: run with REHEARSAL_REWRITE=1"
    found = budget.compare(figures, TABLE[section][name])
    assert not found.exceeded, "\n".join([f"{name}:", *found.exceeded.values(), explanation])
    for text in found.tighter.values():
        warnings.warn(f"{name}: {text}; run with REHEARSAL_REWRITE=1 to tighten it", stacklevel=2)


@pytest.mark.parametrize("name", CASES)
def test_a_run_on_a_gpu(rehearsals: Rehearsals, measured: dict[str, dict[str, dict[str, float]]], name: str) -> None:
    """No tensor on the wrong device, in any act of a run; and a step waits, holds, launches and sends no more than
    before."""
    recording = _recorded(rehearsals, name)
    assert not recording.error, recording.error
    figures = measured["cases"][name] = budget.figures_of(recording)
    if not budget.rewriting():
        _hold("cases", name, figures, "\n".join(budget.waits_of(recording)))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_a_gpu(rehearsals: Rehearsals, measured: dict[str, dict[str, dict[str, float]]], name: str) -> None:
    """Kernels and bytes of one more layer of a model of real size."""
    recordings = []
    for layers in (1, 2):
        recordings.append(rehearsals.run(Request(layer_config(name, layers), 0, acts=("first_step",))))
        assert not recordings[-1].error, recordings[-1].error
    figures = measured["layers"][name] = budget.layer_figures(*recordings)
    if not budget.rewriting():
        _hold("layers", name, figures)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(rehearsals: Rehearsals, fault: str) -> None:
    recording = _recorded(rehearsals, FAULT_CASE, fault, acts=("first_step", "step", "last_step"))
    if FAULTS[fault].caught_by == "error":
        assert "the same device" in recording.error or "a tensor of the CPU" in recording.error, recording.error
        return
    assert not recording.error, recording.error
    found = budget.compare(budget.figures_of(recording), TABLE["cases"][FAULT_CASE])
    assert FAULTS[fault].caught_by in found.exceeded
