"""The runs of a sweep are the same as separately started runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.runs import launch, losses, run, run_warm


@pytest.mark.slow
def test_runs_of_a_sweep_are_those_that_start_by_themselves(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """The second run is forked from a parent process that has already run the first one."""
    short = ("train.steps=3", "train.save_interval=0", "train.eval_interval=0", "parallel=tp2")
    finished = run(launch(*tiny("sweep", *short, "train.seed=1,2"))).require_success()
    run_warm(tiny("alone", *short, "train.seed=2")).require_success()
    first, second = (losses(tmp_path / f"sweep-seed_{seed}") for seed in (1, 2))
    assert second == losses(tmp_path / "alone")
    assert first != second
    assert [line.split()[1] for line in finished.out.splitlines()[-2:]] == ["0", "0"]
