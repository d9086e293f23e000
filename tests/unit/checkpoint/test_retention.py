"""Which checkpoints go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lite.checkpoint.retention import Kept, Saved, prune, to_drop
from tests.unit.checkpoint.examples import SHARD, STATE, save

LOSSES = {100: 5.0, 200: 4.0, 300: None, 400: 4.0, 500: 4.5, 600: float("nan")}
SAVED = [Saved(step, loss) for step, loss in LOSSES.items()]


def kept_steps(kept: Kept, saved: list[Saved] = SAVED, newest_step: int = 600) -> list[int]:
    dropped = to_drop(saved, kept, newest_step)
    return [one.step for one in saved if one.step not in dropped]


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (Kept(0, 0, 0), [100, 200, 300, 400, 500, 600]),
        (Kept(2, 0, 0), [500, 600]),
        (Kept(9, 0, 0), [100, 200, 300, 400, 500, 600]),
        (Kept(1, 300, 0), [300, 600]),
        (Kept(1, 0, 1), [400, 600]),  # of two equal ones the later
        (Kept(1, 0, 2), [200, 400, 600]),
        (Kept(1, 0, 9), [100, 200, 400, 500, 600]),  # no number is no best
        (Kept(2, 200, 1), [200, 400, 500, 600]),
    ],
)
def test_rules_add_up(kept: Kept, expected: list[int]) -> None:
    assert kept_steps(kept) == expected
    assert kept_steps(kept, SAVED[::-1]) == expected[::-1]


@pytest.mark.parametrize("keep_last", [0, 1, 2])
def test_what_is_newer_than_the_current_step_goes(keep_last: int) -> None:
    """The resume passed over damaged 500 and 600, went on from 400 and saved 450."""
    saved = [*SAVED[:4], Saved(450), Saved(500, 0.1, complete=False), Saved(600, complete=False)]
    assert kept_steps(Kept(keep_last, 100, 1), saved, 450)[-1] == 450
    assert kept_steps(Kept(1, 0, 0), saved, 450) == [450]


def test_damaged_ones_take_no_place_and_go_when_they_are_old() -> None:
    saved = [Saved(100), Saved(200, complete=False), Saved(300), Saved(400, 0.1, complete=False), Saved(500)]
    assert kept_steps(Kept(2, 200, 1), saved, 500) == [300, 400, 500]
    assert kept_steps(Kept(0, 0, 0), saved, 500) == [100, 200, 300, 400, 500]


def test_newest_stays_whatever_is_wrong_with_it() -> None:
    assert kept_steps(Kept(1, 0, 0), [Saved(100), Saved(200, complete=False)], 200) == [100, 200]


def test_checkpoints_of_another_version_stay(tmp_path: Path) -> None:
    """After a step back to an older version of megatron_lite, the newer one's work is not thrown away."""
    for step in (100, 200, 300, 400):
        save(tmp_path, step)
    (tmp_path / "step_00000100/manifest.json").write_text('{"info": {}, "files": {}}')
    state = tmp_path / "step_00000400/training/state.json"
    state.write_text(state.read_text().replace('"format": 1', '"format": 2'))
    assert [folder.name for folder in prune(tmp_path, Kept(1, 0, 0), 300)] == ["step_00000200"]


def test_prune_reads_the_losses_and_removes_the_folders(tmp_path: Path) -> None:
    for step, loss in LOSSES.items():
        save(tmp_path, step, replace(STATE, validation_loss=loss))
    (tmp_path / "step_00000500" / SHARD).unlink()
    dropped = prune(tmp_path, Kept(2, 0, 1), 600)
    assert [folder.name for folder in dropped] == ["step_00000100", "step_00000200", "step_00000300"]
    left = ["latest", "step_00000400", "step_00000500", "step_00000600"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
