"""Samples that a run leaves out: counting past them, and the file that keeps them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_lite.data.samples.skips import Rollback, Skips, Window, read_rollbacks, skips_of, write_rollbacks
from megatron_lite.errors import DataError
from megatron_lite.observe.metrics import SKIPS_FILE
from tests.unit.remedies import obeys


def test_nothing_is_left_out() -> None:
    assert Skips().indices(5, 3) == [5, 6, 7]
    assert Skips().count(7) == 7


@pytest.mark.parametrize("seed", range(20))
def test_any_windows(seed: int) -> None:
    """Against the list of all samples, with those in the windows taken out one by one."""
    random = np.random.default_rng(seed)
    windows = [
        Window(int(a), int(a + b)) for a, b in zip(random.integers(0, 80, 6), random.integers(0, 15, 6), strict=True)
    ]
    gone = {index for window in windows for index in range(window.first, window.stop)}
    left = [index for index in range(200) if index not in gone]
    skips = Skips(windows)
    assert [skips.index(count) for count in range(90)] == left[:90]
    assert [skips.count(index) for index in left] == list(range(len(left)))
    assert sum(window.stop - window.first for window in skips.windows) == len(gone)


def test_within_a_window_nothing_is_consumed() -> None:
    skips = Skips([Window(10, 14)])
    assert [skips.count(index) for index in (9, 10, 12, 13, 14, 15)] == [9, 10, 10, 10, 10, 11]
    assert skips.before(10) == ()
    assert skips.before(11) == (Window(10, 11),)


def test_touching_windows_are_one() -> None:
    assert Skips([Window(4, 8), Window(0, 4), Window(6, 9), Window(20, 20)]).windows == (Window(0, 9),)


def test_file(tmp_path: Path) -> None:
    assert read_rollbacks(tmp_path) == []
    rollbacks = [Rollback(Window(64, 96), 3, 2, "loss"), Rollback(Window(96, 128), 3, 2, "loss again")]
    write_rollbacks(tmp_path, rollbacks)
    assert read_rollbacks(tmp_path) == rollbacks
    assert skips_of(rollbacks).windows == (Window(64, 128),)


BACKWARDS = '{"format": 1, "rollbacks": [{"window": {"first": 9, "stop": 8}, "step": 3, "to_step": 2, "reason": "x"}]}'


@pytest.mark.parametrize(
    "content",
    ["", "[]", "\0" * 9, "[" * 100_000, '{"format": 2}', '{"format": 1, "rollbacks": [{"step": 1}]}', BACKWARDS],
)
@obeys("megatron_lite/data/samples/skips.py:_unknown")
def test_damaged_file(tmp_path: Path, content: str) -> None:
    (tmp_path / SKIPS_FILE).write_text(content)
    with pytest.raises(DataError, match=rf"; restore {SKIPS_FILE}, or train in a new train\.run_dir"):
        read_rollbacks(tmp_path)
    assert read_rollbacks(tmp_path / "new") == []
    rollbacks = [Rollback(Window(64, 96), 3, 2, "loss")]
    write_rollbacks(tmp_path, rollbacks)
    assert read_rollbacks(tmp_path) == rollbacks
