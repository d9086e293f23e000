from pathlib import Path

import pytest

from megatron_lite.errors import RunEnd
from megatron_lite.observe.markers import TELLING, ask_to_stop, clear_markers, leave_marker, read_marker


def test_a_marker_is_read_back_as_it_was_left(tmp_path: Path) -> None:
    leave_marker(tmp_path, RunEnd.PREEMPTED, "SIGTERM", step=12)
    found = read_marker(tmp_path)
    assert found is not None
    assert (found.end, found.step, found.message) == (RunEnd.PREEMPTED, 12, "SIGTERM")


def test_the_first_of_equal_ends_wins(tmp_path: Path) -> None:
    leave_marker(tmp_path, RunEnd.HUNG, "rank 5")
    leave_marker(tmp_path, RunEnd.HUNG, "rank 6")
    found = read_marker(tmp_path)
    assert found is not None
    assert found.message == "rank 5"
    assert [path.name for path in tmp_path.iterdir()] == ["HUNG"]


@pytest.mark.parametrize("end", [end for end in RunEnd if end is not RunEnd.FAILED])
def test_any_end_explains_more_than_a_failure(tmp_path: Path, end: RunEnd) -> None:
    leave_marker(tmp_path, RunEnd.FAILED, "connection closed by peer")
    leave_marker(tmp_path, end, "the cause")
    found = read_marker(tmp_path)
    assert found is not None
    assert found.end is end


def test_a_new_attempt_knows_nothing_of_the_last_one(tmp_path: Path) -> None:
    for end in RunEnd:
        leave_marker(tmp_path, end, "")
    ask_to_stop(tmp_path)
    clear_markers(tmp_path)
    assert read_marker(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_every_end_has_its_place() -> None:
    assert set(TELLING) == set(RunEnd)
