"""A rank is killed anywhere in a save: the run resumes bit by bit from the previous or from the new checkpoint.

Real ranks get a real SIGKILL just before each kind of change to the disk. The other rank ends by itself, and its error
does not blame the configuration.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.distributed.equivalence_cases import VOCAB_SIZE, run_config
from tests.distributed.fault_ranks import Held, killed_rank, resumed_and_saved_rank, saved_rank, trained_rank
from tests.distributed.harness import RankError, run_ranks

OLD, NEW, NEXT = "step_00000001", "step_00000002", "step_00000003"
KINDS = (
    {
        "os.mkdir new",
        "os.mkdir new/training",
        "open new/model.safetensors",
        "posix_fallocate new/model.safetensors",
        "posix_fallocate new/training/exp_avg.safetensors",
        "open new/config.json",
        "open new/training/state.json",
        "pwrite new/model.safetensors",
        "pwrite new/training/exp_avg.safetensors",
        "fsync new/model.safetensors",
        "open new/manifest.json",
        "fsync new/manifest.json",
        "fsync new",
        "os.rename new",
        "fsync checkpoints",
        "open .latest",
        "fsync .latest",
        "os.rename .latest",
        "os.rename step_00000001",
        "shutil.rmtree .step_00000001.removing",
        "os.remove manifest.json",
    },
    {
        "open new/model.safetensors",
        "pwrite new/model.safetensors",
        "pwrite new/training/exp_avg.safetensors",
        "fsync new/training/exp_avg.safetensors",
    },
)
"""Kinds of changes by rank: rank 0 also writes files without tensors, publishes the checkpoint and prunes old ones."""


@dataclass(frozen=True)
class Kill:
    """One interrupted save of step 2, which would have pruned step 1."""

    checkpoints: Path
    victim: int
    change: str
    """The change that the victim was about to make."""
    survivor: str
    """How the other rank ended."""


@pytest.fixture(scope="module")
def jobs() -> list[Held]:
    return run_ranks(trained_rank, 2, run_config("gpt2", dp=2, zero_stage=1), VOCAB_SIZE)


def kills(jobs: list[Held], folder: Path) -> list[Kill]:
    """One kill for each rank and each kind of change, at its first occurrence, in order; every other save is in the
    background."""
    before = folder / "before"
    run_ranks(saved_rank, 2, jobs, before, [1])
    whole = run_ranks(killed_rank, 2, jobs, copied(before, folder / "whole"), False, 0, 0)
    found = []
    for victim, (changes, kinds) in enumerate(zip(whole, KINDS, strict=True)):
        for index, point in enumerate(sorted(changes.index(kind) + 1 for kind in kinds)):
            checkpoints = copied(before, folder / f"{victim}-{point}")
            with pytest.raises(RankError, match=f"^rank {victim} died with exit code -9"):
                run_ranks(killed_rank, 2, jobs, checkpoints, index % 2 == 0, victim, point, grace_seconds=100.0)
            survivor = (checkpoints.parent / f"{1 - victim}.end").read_text()
            found.append(Kill(checkpoints, victim, changes[point - 1], survivor))
    return found


def copied(checkpoints: Path, folder: Path) -> Path:
    return Path(shutil.copytree(checkpoints, folder / "checkpoints"))


@pytest.mark.slow
def test_killed_at_each_kind_of_change(jobs: list[Held], tmp_path: Path) -> None:
    found = kills(jobs, tmp_path)
    folders = [one.checkpoints for one in found]
    left = [(folder / f".{NEW}.incomplete").is_dir() for folder in folders]
    on_ranks = run_ranks(resumed_and_saved_rank, 2, jobs, folders)
    names: dict[int, list[str | None]] = {0: [], 1: []}
    for kill, unfinished, (resumed, resaved, names_after), (other, _, _) in zip(found, left, *on_ranks, strict=True):
        names[kill.victim].append(resumed.name)
        assert resumed.is_right, kill
        assert (other.name, other.is_right, other.messages) == (resumed.name, True, []), kill
        assert any("it was never finished" in line for line in resumed.messages) == unfinished, kill
        assert (resaved.name, resaved.is_right, resaved.messages) == (NEXT, True, []), kill
        assert names_after == ["latest", NEXT], kill
        expected = "RuntimeError: a checkpoint was not finished, because another rank has ended"
        assert kill.survivor.startswith(expected), kill
    assert set(names[1]) == {OLD}, "published without a rank's part"
    assert names[0] == sorted(names[0]), "old, old, ..., new, new"
    assert set(names[0]) == {OLD, NEW}
