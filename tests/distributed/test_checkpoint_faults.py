"""Checkpoints of several ranks on bad disks: damaged files are never loaded, and all ranks learn of failed writes."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed.equivalence_cases import VOCAB_SIZE, run_config
from tests.distributed.fault_ranks import (
    Held,
    failing_saves_rank,
    full_disk_rank,
    queued_saves_rank,
    resumed_rank,
    saved_rank,
    trained_rank,
)
from tests.distributed.harness import run_ranks
from tests.mounts import small_disk
from tests.unit.checkpoint.test_pickle import Payload

OLD, NEW = "step_00000001", "step_00000002"
MODEL, MOMENT = "model-00002-of-00010.safetensors", "training/exp_avg_sq-00003-of-00010.safetensors"


@pytest.fixture(scope="module")
def jobs() -> list[Held]:
    return run_ranks(trained_rank, 2, run_config("gpt2", dp=2, zero_stage=1), VOCAB_SIZE)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def stray(mark: Path) -> Callable[[Path], None]:
    """Files that no save has written, with the names of weights and moments, whose pickles would execute code."""

    def plant(folder: Path) -> None:
        for name in ("model-00001-of-00001.safetensors", "model.safetensors", "training/exp_avg.safetensors"):
            (folder / name).write_bytes(pickle.dumps(Payload(mark)))

    return plant


def damages(mark: Path) -> dict[str, tuple[Callable[[Path], object], str, list[str]]]:
    """By name: the damage to the checkpoint of step 2, what is then resumed from, and parts of the messages."""
    other_content = "has other content than the manifest says"
    hint = f"latest names '{NEW}', which is skipped; the newest complete one is {OLD}"
    found: dict[str, tuple[Callable[[Path], object], str, list[str]]] = {
        f"flipped {name}": (lambda folder, name=name: flip(folder / name), OLD, [f"{name} {other_content}", hint])
        for name in (MODEL, MOMENT, "config.json", "tokenizer.json", "model.safetensors.index.json")
    }
    return found | {
        "flipped state": (lambda folder: flip(folder / "training/state.json"), OLD, ["Skipping", hint]),
        "flipped manifest": (lambda folder: flip(folder / "manifest.json"), OLD, ["Skipping", hint]),
        "truncated": (lambda folder: cut(folder / MODEL), OLD, [f"{MODEL} is ", hint]),
        "missing": (lambda folder: (folder / MOMENT).unlink(), OLD, [f"{MOMENT} is missing", hint]),
        "no manifest": (lambda folder: (folder / "manifest.json").unlink(), OLD, ["it has no manifest.json", hint]),
        "empty": (empty, OLD, ["it has no manifest.json, so it was never finished", hint]),
        "gone": (shutil.rmtree, OLD, [f"latest names '{NEW}', and there is no such checkpoint"]),
        "no latest": (lambda folder: (folder.parent / "latest").unlink(), NEW, []),
        "stray files": (stray(mark), NEW, []),
    }


def test_damaged_checkpoint_is_passed_over_by_all_ranks(jobs: list[Held], tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run_ranks(saved_rank, 2, jobs, whole, [1, 2])
    assert (whole / NEW / MODEL).exists()
    assert (whole / NEW / MOMENT).exists()
    cases = damages(tmp_path / "mark")
    folders = [tmp_path / name for name in cases]
    for folder, (damage, _, _) in zip(folders, cases.values(), strict=True):
        shutil.copytree(whole, folder)
        damage(folder / NEW)
    writer, other = run_ranks(resumed_rank, 2, jobs, folders)
    for (case, (_, name, parts)), mine, theirs in zip(cases.items(), writer, other, strict=True):
        assert (mine.name, mine.is_right) == (name, True), case
        assert (theirs.name, theirs.is_right, theirs.messages) == (name, True, []), case
        assert len(mine.messages) == len(parts), case
        assert all(part in line for part, line in zip(parts, mine.messages, strict=True)), (case, mine.messages)
    assert not (tmp_path / "mark").exists(), "a pickle was run"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with space for two checkpoints but not for three."""
    with small_disk(tmp_path / "disk", kibibytes=2300) as folder:
        yield folder


@pytest.mark.parametrize("asynchronous", [True, False])
def test_disk_that_fills_up_during_a_save(asynchronous: bool, jobs: list[Held], disk: Path) -> None:
    """There was enough space when the save began; another process uses it up."""
    writer, other = run_ranks(full_disk_rank, 2, jobs, disk, asynchronous)
    checkpoints = disk / "checkpoints"
    assert writer.error == other.error
    assert writer.error is not None
    assert writer.error.startswith(f"DiskError: {checkpoints} cannot be written ([Errno 28] No space left")
    assert "free some space or fix its permissions: the same command resumes from the last" in writer.error
    assert writer.left == ["latest", OLD], "nothing of the failed save"
    assert [writer.before.name, writer.after.name] == [OLD, NEW]
    assert all(found.is_right for rank in (writer, other) for found in (rank.before, rank.after))
    assert writer.too_little == other.too_little
    assert writer.too_little is not None
    for part in ("DiskError", "KiB for a checkpoint, but its disk has", "free some space", "train.keep_last"):
        assert part in writer.too_little


def test_all_ranks_learn_of_a_read_only_disk(jobs: list[Held], disk: Path) -> None:
    run_ranks(saved_rank, 2, jobs, disk / "checkpoints", [1])
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    (one, left, _), (other, *_) = run_ranks(failing_saves_rank, 2, jobs, disk / "checkpoints", None)
    assert one == other
    assert "Read-only file system" in one
    assert left == ["latest", OLD]
    (found,), _ = run_ranks(resumed_rank, 2, jobs, [disk / "checkpoints"])
    assert (found.name, found.is_right, found.messages) == (OLD, True, [])


@pytest.mark.parametrize("fault", [OSError(5, "Input/output error"), ValueError("a fault of ours")])
def test_fault_on_one_rank_in_the_background_ends_the_next_save_on_all(
    fault: Exception, jobs: list[Held], tmp_path: Path
) -> None:
    writer, other = run_ranks(failing_saves_rank, 2, jobs, tmp_path / "checkpoints", fault)
    if isinstance(fault, OSError):
        assert writer[0] == other[0]
        assert "DiskError: " in writer[0]
        assert "Input/output error" in writer[0]
    else:
        assert writer[0] == "CheckpointError: rank 1 failed to write a checkpoint: ValueError('a fault of ours')"
        assert other[0] == "ValueError: a fault of ours"
    assert writer[1:] == ([], [2]), "nothing is left of the first save, and the second one was made"
    assert other[1:] == ([], [2])


def test_saves_queue_up_and_the_same_step_is_saved_again(jobs: list[Held], tmp_path: Path) -> None:
    for events, reports, found in run_ranks(queued_saves_rank, 2, jobs, tmp_path / "checkpoints"):
        assert events == [
            "the first save has returned",
            "the second save waits",
            f".{OLD}.incomplete is written beside nothing",
            f".{NEW}.incomplete is written beside {OLD}",
            f".{NEW}.incomplete is written beside {OLD}, {NEW}",
        ]
        assert reports == [1, 2, 2]
        assert (found.name, found.is_right, found.messages) == (NEW, True, [])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", OLD, NEW]
