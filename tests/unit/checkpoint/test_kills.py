"""A process that is killed while it saves or removes leaves the old state or the new one: real SIGKILLs, everywhere."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.checkpoint.folder import begin, explained, newest_complete, publish
from megatron_lite.checkpoint.retention import Kept, prune
from megatron_lite.checkpoint.state import OptimizerState
from megatron_lite.errors import CheckpointError, DiskError
from tests.unit.checkpoint.examples import SHARD, STATE, Tensors, save, write_content

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "fsync"}


SMALL = replace(STATE, optimizer=OptimizerState("sgd", 100, ()))


@pytest.fixture(autouse=True)
def _fsync_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk outlives a killed process by itself."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save_and_prune(checkpoints: Path, step: int) -> None:
    save(checkpoints, step, SMALL)
    prune(checkpoints, Kept(1, 0, 0), step)


def killed_at(count: int, action: Callable[[], None], below: Path) -> bool:
    """Run the action in a child that is killed ahead of its `count`-th change to the disk; whether there was one."""
    pid = os.fork()
    if pid == 0:
        _at_change(count, below, lambda: os.kill(os.getpid(), signal.SIGKILL))
        action()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def refused_at(count: int, action: Callable[[], None], below: Path) -> bool:
    """The same, where the disk has no room for that change; the child's error must be ours."""
    pid = os.fork()
    if pid == 0:
        _at_change(count, below, lambda: _raise(OSError(28, "No space left on device")))
        code = 3
        try:
            action()
            code = 0
        except (CheckpointError, DiskError) as error:
            code = 1 if "No space left on device" in str(error) else 2
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 1)
    return status != 0


def _raise(error: OSError) -> None:
    raise error


def _at_change(count: int, below: Path, happens: Callable[[], object]) -> None:
    """The interpreter's own audit hook sees every change but fsync."""
    seen, fsync = 0, os.fsync

    def step() -> None:
        nonlocal seen
        seen += 1
        if seen == count:
            happens()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        opens_to_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (opens_to_write and str(arguments[0]).startswith(str(below))) or event in CHANGES:
            step()

    def counted_fsync(descriptor: int) -> None:
        step()
        fsync(descriptor)

    os.fsync = counted_fsync
    sys.addaudithook(hook)


def newest(checkpoints: Path) -> str | None:
    found = newest_complete(checkpoints, lambda line: None)
    return found[0].name if found else None


@pytest.mark.parametrize("faulty", [killed_at, refused_at])
def test_old_or_new(faulty: Callable[[int, Callable[[], None], Path], bool], tmp_path: Path) -> None:
    """Whichever change is the last; with one checkpoint to prune, and leftovers of an earlier kill to clear."""
    states, count, failed = [], 0, True
    while failed:
        count += 1
        checkpoints = tmp_path / str(count)
        save(checkpoints, 100, SMALL)
        (checkpoints / ".step_00000050.removing" / "training").mkdir(parents=True)

        def action(folder: Path = checkpoints) -> None:
            temporary = begin(folder, 200)
            with explained(temporary):
                write_content(temporary, replace(SMALL, step=200))
            publish(temporary, {})
            prune(folder, Kept(1, 0, 0), 200)

        failed = faulty(count, action, checkpoints)
        states.append(newest(checkpoints))
        save_and_prune(checkpoints, 300)  # whatever was left, the next save works
        assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000300"]
        assert newest(checkpoints) == "step_00000300"
    assert count > 20
    assert set(states) == {"step_00000100", "step_00000200"}
    assert states == sorted(states)  # old, old, ..., new, new


def test_killed_while_a_step_is_saved_again(tmp_path: Path) -> None:
    """An intact checkpoint of the same step is there until the new one is."""
    other: Tensors = {"wte.weight": np.ones((2, 2), np.float32)}
    count, killed = 0, True
    while killed:
        count += 1
        checkpoints = tmp_path / str(count)
        save(checkpoints, 200, SMALL)

        def again(folder: Path = checkpoints) -> None:
            save(folder, 200, SMALL, weights=other)

        killed = killed_at(count, again, checkpoints)
        assert newest_complete(checkpoints, lambda line: None) is not None
        save(checkpoints, 300, SMALL)
        names = sorted(path.name for path in checkpoints.iterdir())
        assert names == ["latest", "step_00000200", "step_00000300"]


def test_killed_while_pruning(tmp_path: Path) -> None:
    count, killed = 0, True
    while killed:
        count += 1
        checkpoints = tmp_path / str(count)
        for step in (100, 200, 300):
            save(checkpoints, step, SMALL)
        killed = killed_at(count, lambda folder=checkpoints: prune(folder, Kept(1, 0, 0), 300), checkpoints)
        messages: list[str] = []
        found = newest_complete(checkpoints, messages.append)
        assert found is not None
        assert (found[0].name, messages) == ("step_00000300", [])
        assert all((folder / SHARD).exists() for folder in checkpoints.glob("step_*"))
    assert count > 10


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power failure would lose: files and folders are synced before the rename, the parent after it."""
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def log_fsync(descriptor: int) -> None:
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{tmp_path}/")))
        fsync(descriptor)

    def log_rename(source: Path, target: Path) -> None:
        events.append(("rename", Path(target).name))
        rename(source, target)

    temporary = begin(tmp_path, 200)
    write_content(temporary, replace(STATE, step=200))
    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "rename", log_rename)
    folder = publish(temporary, {})
    renamed = events.index(("rename", folder.name))
    inside = {f"{temporary.name}/{path.relative_to(folder)}" for path in folder.rglob("*")} | {temporary.name}
    assert {path for _, path in events[:renamed]} == inside
    assert events[renamed - 1] == ("sync", temporary.name)
    root = str(tmp_path)
    assert events[renamed + 1 :] == [("sync", root), ("sync", ".latest"), ("rename", "latest"), ("sync", root)]
