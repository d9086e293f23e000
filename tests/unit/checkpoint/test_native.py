"""Crash safety of checkpoints, with an engine that only writes a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_lite.checkpoint import native
from megatron_lite.checkpoint.native import CheckpointInfo
from megatron_lite.errors import CheckpointError

INFO = CheckpointInfo(0, 2, 2, 2, 1, "fp32", "fingerprint")


class Engine:
    """Writes `content`; with `dies` as a process that is killed in the middle, with `full` as on a full disk."""

    def __init__(self, content: bytes = b"weights", *, dies: bool = False, full: bool = False) -> None:
        self.content, self.dies, self.full = content, dies, full
        self.loaded: bytes | None = None

    def save(self, folder: Path, tag: str) -> None:
        (folder / tag).mkdir()
        (folder / tag / "state.pt").write_bytes(self.content)
        if self.dies:
            raise KeyboardInterrupt
        if self.full:
            raise OSError(28, "No space left on device")

    def load(self, folder: Path, tag: str) -> None:
        self.loaded = (folder / tag / "state.pt").read_bytes()


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(folder: Path, step: int, engine: Engine | None = None, keep_last: int = 0) -> Path:
    return native.save(engine or Engine(), folder, INFO.at_step(step), keep_last=keep_last)


def newest(folder: Path) -> tuple[str | None, list[str]]:
    messages: list[str] = []
    found = native.newest_complete(folder, messages.append)
    return (found[0].name if found else None), messages


def test_round_trip(tmp_path: Path) -> None:
    folder = save(tmp_path, 5, Engine(b"step five"))
    engine = Engine()
    native.load(engine, folder)
    assert engine.loaded == b"step five"
    assert newest(tmp_path) == ("step_00000005", [])


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing", "manifest cut", "manifest of another version"])
def test_damaged_one_is_passed_over_with_the_reason(fault: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    damaged = save(tmp_path, 2)
    state, manifest = damaged / native.STATE_TAG / "state.pt", damaged / native.MANIFEST
    if fault == "truncated":
        state.write_bytes(b"weigh")
    elif fault == "flipped":
        state.write_bytes(b"weights"[:-1] + b"S")
    elif fault == "missing":
        state.unlink()
    elif fault == "manifest cut":
        manifest.write_text(manifest.read_text()[:-9])
    else:
        manifest.write_text('{"info": {"step": 2, "flavour": 1}, "files": {}}')
    name, messages = newest(tmp_path)
    assert name == "step_00000001"
    assert len(messages) == 1
    assert messages[0].startswith("Skipping checkpoint step_00000002: ")


def test_killed_save_is_invisible_and_cleaned_up(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, Engine(dies=True))
    assert newest(tmp_path) == ("step_00000001", [])
    save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def test_full_disk_is_one_clear_error_and_keeps_the_old(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"step_00000002 cannot be written .*No space left"):
        save(tmp_path, 2, Engine(full=True))
    assert newest(tmp_path)[0] == "step_00000001"


def test_keeps_the_last(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000020", "step_00000030"]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_pruning_spares_the_new_one_and_drops_damaged_later_ones(keep_last: int, tmp_path: Path) -> None:
    """The resume passed over a damaged step 200, went on from 100 and saved 150."""
    save(tmp_path, 100)
    (save(tmp_path, 200) / native.STATE_TAG / "state.pt").unlink()
    save(tmp_path, 150, keep_last=keep_last)
    expected = ["step_00000100", "step_00000150"][-keep_last:]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


def test_other_layout_is_refused_by_key(tmp_path: Path) -> None:
    other = replace(INFO, tensor_parallel_size=4)
    with pytest.raises(CheckpointError, match="tensor_parallel_size: the checkpoint has 2, this run 4"):
        native.require_fit(tmp_path, INFO, other)
