"""Which samples are left out after a spike, and which checkpoints a run may go on from then."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from megatron_lite.checkpoint.state import CheckpointState, Layout, OptimizerState
from megatron_lite.config.schema import TrainConfig
from megatron_lite.config.stability import StabilityConfig
from megatron_lite.data.samples.skips import Rollback, Skips, Window, read_rollbacks
from megatron_lite.errors import DISK_ERRNOS, DiskError, DivergedError, TrainingError
from megatron_lite.optim.batch_ramp import BEGINNING, BatchSchedule, Origin
from megatron_lite.train.callbacks import Save
from megatron_lite.train.stability import rollback_record as module
from megatron_lite.train.stability.rollback import RollbackCallback, next_window, unsuited
from megatron_lite.train.stability.rollback_record import RollbackRecord
from tests.unit.remedies import obeys

BATCH = 8


def rollback(first: int, stop: int) -> Rollback:
    return Rollback(Window(first, stop), step=0, to_step=0, reason="loss")


def state(samples: int, *skipped: tuple[int, int]) -> CheckpointState:
    return CheckpointState(
        step=samples // BATCH,
        samples=samples,
        layout=Layout(1, 1, 1, 1, False),
        precision="fp32",
        optimizer=OptimizerState("adamw", 1, ()),
        loss_scale=None,
        data_fingerprint="",
        hugging_face=True,
        validation_loss=None,
        skipped=skipped,
    )


def test_first_window_is_what_led_in() -> None:
    assert next_window([], Window(80, 96), BATCH, lead_in_steps=1) == (Window(80, 96), 0)


def test_windows_at_one_place_grow() -> None:
    """The spike comes back behind the place that was jumped over: 1, 3 and 7 steps more are left out."""
    rollbacks, windows = [rollback(80, 96)], []
    for _ in range(3):
        stop = rollbacks[-1].window.stop
        window, in_a_row = next_window(rollbacks, Window(72, stop + BATCH), BATCH, lead_in_steps=1)
        windows.append((window.stop - stop - BATCH, in_a_row))
        rollbacks.append(Rollback(window, 0, 0, "loss"))
    assert windows == [(BATCH, 1), (3 * BATCH, 2), (7 * BATCH, 3)]


def test_another_place_begins_anew() -> None:
    earlier = [rollback(80, 96), rollback(72, 120)]
    assert next_window(earlier, Window(400, 416), BATCH, lead_in_steps=1) == (Window(400, 416), 0)
    far = [*earlier, rollback(400, 416)]
    assert next_window(far, Window(408, 424), BATCH, lead_in_steps=1) == (Window(408, 424 + BATCH), 1)


@pytest.mark.parametrize(
    ("samples", "made_with", "suits"),
    [
        (80, (), True),  # up to the window and no further
        (79, (), True),
        (81, (), False),
        (200, (), False),
        (80, ((80, 96),), True),  # it has left the window out
        (200, ((80, 96),), True),
        (200, ((80, 88),), False),  # less than that
        (200, ((80, 96), (300, 310)), True),
    ],
)
def test_checkpoints_that_suit_one_window(samples: int, made_with: tuple[tuple[int, int], ...], suits: bool) -> None:
    reason = unsuited(Skips([Window(80, 96)]), state(samples, *made_with))
    assert (reason is None) == suits


def test_a_later_window_leaves_earlier_checkpoints_alone() -> None:
    skips = Skips([Window(80, 96), Window(400, 416)])
    assert unsuited(skips, state(300, (80, 96))) is None
    assert unsuited(skips, state(384, (80, 96))) is None  # 384 + 16 left out = 400
    assert unsuited(skips, state(385, (80, 96))) is not None
    assert unsuited(skips, state(300)) is not None


def test_a_window_that_grows_behind_a_checkpoint_leaves_it_alone() -> None:
    """It stands where the first of two windows that touch is jumped over, and has read nothing of the second."""
    skips = Skips([Window(80, 96), Window(96, 112)])
    assert unsuited(skips, state(80, (80, 96))) is None
    assert unsuited(skips, state(81, (80, 96))) is not None


def rollback_callback(run_dir: Path) -> RollbackCallback:
    parts = [Mock() for _ in range(6)]
    return RollbackCallback(StabilityConfig(lead_in_steps=2), run_dir, True, *parts, record=Mock(rollbacks=[]))


@pytest.mark.parametrize(
    ("origin", "step", "window"),
    [
        (BEGINNING, 33, Window(30 * BATCH, 33 * BATCH)),
        (Origin(30, 30 * BATCH), 33, Window(30 * BATCH, 33 * BATCH)),
        (Origin(32, 32 * BATCH), 33, Window(30 * BATCH, 33 * BATCH)),  # its first step
        (BEGINNING, 1, Window(0, BATCH)),
    ],
)
def test_what_led_in_may_be_of_an_earlier_attempt(origin: Origin, step: int, window: Window, tmp_path: Path) -> None:
    schedule = BatchSchedule(TrainConfig(global_batch_size=BATCH), origin)
    trainer = SimpleNamespace(schedule=schedule, source=SimpleNamespace(skips=Skips()))
    record = SimpleNamespace(step=step, batch=schedule.at(step - 1))
    assert rollback_callback(tmp_path)._led_in(trainer, record) == window


@obeys("megatron_lite/train/stability/rollback.py:_roll_back")
def test_all_rollbacks_are_used_up(tmp_path: Path) -> None:
    callback = rollback_callback(tmp_path)
    callback.record = Mock(rollbacks=[rollback(80, 96)], skips=Skips([Window(80, 96)]))
    callback.checkpoints.folder = tmp_path / "checkpoints"
    schedule = BatchSchedule(TrainConfig(global_batch_size=BATCH), BEGINNING)
    trainer = Mock(schedule=schedule, source=SimpleNamespace(skips=Skips()))
    spike = Mock(record=Mock(step=40, batch=schedule.at(39)))
    callback.settings = StabilityConfig(max_rollbacks=1)
    with pytest.raises(DivergedError, match=r"in a new train\.run_dir, or raise stability\.max_rollbacks"):
        callback._roll_back(trainer, spike)
    trainer.rewind.assert_not_called()
    callback.settings = StabilityConfig(max_rollbacks=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callback, "_checkpoint", lambda *asked: (tmp_path, state(72)))
        patch.setattr(callback, "_report", Mock())
        callback._roll_back(trainer, spike)
    trainer.rewind.assert_called_once()


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RollbackRecord:
    """Of the writing rank, which is alone."""
    monkeypatch.setattr(module, "agreed", lambda answer: answer)
    return RollbackRecord(tmp_path, is_writer=True, report=Mock())


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(module, "write_rollbacks", Mock(side_effect=OSError(number, os.strerror(number))))


@pytest.mark.parametrize("number", sorted(DISK_ERRNOS))
def test_a_full_disk_ends_no_rollback_and_the_file_is_written_once_there_is_room(
    number: int, record: RollbackRecord
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "agreed", lambda answer: answer)
        refuse(patch, number)
        record.add(rollback(80, 96))
        record.try_again()
        assert "training goes on" in record.report.call_args.args[0]
        assert record.skips.windows == (Window(80, 96),)
    record.try_again()
    record.try_again()
    assert read_rollbacks(record.run_dir) == record.rollbacks
    assert "checkpoints can be saved again" in record.report.call_args.args[0]
    assert record.report.call_count == 2


@obeys("megatron_lite/train/stability/rollback_record.py:require_written")
def test_no_checkpoint_is_saved_before_the_rollback_is_on_the_disk(
    record: RollbackRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next attempt would pass over it, for it was trained without samples that this attempt alone leaves out."""
    assert unsuited(Skips(), state(200, (80, 96))) is not None
    assert unsuited(Skips(), state(80)) is None, "it begins from the one that was gone back to"
    checkpoints, trainer = Mock(saver=Mock(reports=[])), Mock()
    save = Save(Mock(), checkpoints, Mock(newest=None), record)
    with monkeypatch.context() as patch:
        refuse(patch, errno.ENOSPC)
        record.add(rollback(80, 96))
        with pytest.raises(DiskError, match=r"skipped_samples.json cannot be written.*free space"):
            save.at(trainer, 25)
        checkpoints.save.assert_not_called()
    save.at(trainer, 25)
    checkpoints.save.assert_called_once()
    assert read_rollbacks(record.run_dir) == record.rollbacks


@obeys("megatron_lite/train/stability/rollback_record.py:add")
@pytest.mark.parametrize("answer", ["add", "require_written"])
def test_every_rank_ends_where_the_file_cannot_be_written(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Exception | None] = []
    monkeypatch.setattr(module, "agreed", lambda problem: said.append(problem) or problem)
    record = RollbackRecord(tmp_path, is_writer=True, report=Mock())
    written = module.write_rollbacks
    refuse(monkeypatch, errno.EACCES if answer == "add" else errno.ENOSPC)
    expected = TrainingError if answer == "add" else DiskError
    if answer == "require_written":
        record.add(rollback(80, 96))
    with pytest.raises(expected):
        record.add(rollback(80, 96)) if answer == "add" else record.require_written()
    assert isinstance(said[-1], expected)
    other = RollbackRecord(tmp_path, is_writer=False, report=Mock(), rollbacks=[rollback(80, 96)])
    monkeypatch.setattr(module, "agreed", lambda problem: said[-1])
    with pytest.raises(expected):
        other.add(rollback(200, 216)) if answer == "add" else other.require_written()
    if answer == "add":  # the same command, once the permissions are fixed
        monkeypatch.setattr(module, "write_rollbacks", written)
        monkeypatch.setattr(module, "agreed", lambda problem: problem)
        again = RollbackRecord(tmp_path, is_writer=True, report=Mock(), rollbacks=read_rollbacks(tmp_path))
        again.add(rollback(80, 96))
        assert read_rollbacks(tmp_path) == [rollback(80, 96)]
