"""Functions that the ranks run in tests of damaged and interrupted checkpoints.

One job trains and returns the state of its ranks (`trained_rank`); the others save and load that state without an
engine.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_lite.checkpoint import folder as folders
from megatron_lite.checkpoint import saving, tensor_files
from megatron_lite.checkpoint.file_plan import FilePlan, shapes_of_all_ranks
from megatron_lite.checkpoint.folder import folder_name
from megatron_lite.checkpoint.fragments import Fragment
from megatron_lite.checkpoint.loading import load, newest_complete
from megatron_lite.checkpoint.retention import Kept
from megatron_lite.checkpoint.saving import Saver
from megatron_lite.checkpoint.state import CheckpointState
from megatron_lite.config.schema import RunConfig
from tests.distributed.checkpoint_ranks import state_of
from tests.distributed.layout_ranks import synthetic_engine, train_steps

DOCUMENTS = {"config.json": b'{"model_type": "gpt2"}', "tokenizer.json": b'{"version": "1.0"}'}
STEPS = (1, 2, 3)
REMOVALS = {"os.remove", "os.rmdir"}  # within shutil.rmtree the paths are relative
CHANGES = {"os.rename", "os.mkdir", "shutil.rmtree", *REMOVALS}


@dataclass
class Held:
    """The state of one rank after each of the STEPS."""

    plan: FilePlan
    fragments: dict[int, list[Fragment]]
    states: dict[int, CheckpointState]

    def saver(self, checkpoints: Path, *, asynchronous: bool, keep_last: int = 0) -> Saver:
        return Saver(checkpoints, self.plan, DOCUMENTS, Kept(keep_last, 0, 0), asynchronous=asynchronous)

    def save(self, saver: Saver, step: int) -> None:
        saver.save(self.fragments[step], self.states[step])

    def is_loaded_from(self, folder: Path, state: CheckpointState) -> bool:
        """Whether loading the folder restores bitwise the state after its step."""
        expected = self.fragments[state.step]
        found = [replace(one, values=torch.zeros_like(one.values)) for one in expected]  # as padding is
        load(folder, self.plan, found, self.plan.sets)
        return state == self.states[state.step] and all(
            torch.equal(one.values, other.values) for one, other in zip(found, expected, strict=True)
        )


def trained_rank(config: RunConfig, vocab_size: int) -> Held:
    engine, batches_from = synthetic_engine(config, vocab_size)
    plan = FilePlan.of(shapes_of_all_ranks(engine.shards.shapes()), None, largest_bytes=30_000)
    held = Held(plan, {}, {})
    for step in STEPS:
        train_steps(engine, batches_from, config, step - 1, 1)
        held.fragments[step] = [replace(one, values=one.values.clone()) for one in engine.shards.fragments()]
        held.states[step] = state_of(engine, step)
    return held


def saved_rank(jobs: Sequence[Held], checkpoints: Path, steps: Sequence[int]) -> None:
    """Save checkpoints of these steps."""
    held = jobs[dist.get_rank()]
    saver = held.saver(checkpoints, asynchronous=False)
    for step in steps:
        held.save(saver, step)


@dataclass(frozen=True)
class Found:
    """What a new job loads from a folder of checkpoints."""

    name: str | None
    is_right: bool
    """Whether it is bitwise what was saved."""
    messages: list[str]
    """Messages of the writing rank; the other ranks print none."""


def resumed_rank(jobs: Sequence[Held], folders: Sequence[Path]) -> list[Found]:
    """What each folder is resumed from."""
    return [_found(jobs[dist.get_rank()], folder) for folder in folders]


def _found(held: Held, checkpoints: Path) -> Found:
    messages: list[str] = []
    found = newest_complete(checkpoints, messages.append)
    return Found(found and found[0].name, found is not None and held.is_loaded_from(*found), messages)


def resumed_and_saved_rank(jobs: Sequence[Held], folders: Sequence[Path]) -> list[tuple[Found, Found, list[str]]]:
    """The same, then the result of the next save in the same folder, and all files there after it."""
    held = jobs[dist.get_rank()]
    results = []
    for folder in folders:
        before = _found(held, folder)
        held.save(held.saver(folder, asynchronous=False, keep_last=1), STEPS[-1])
        results.append((before, _found(held, folder), sorted(path.name for path in folder.iterdir())))
    return results


def killed_rank(jobs: Sequence[Held], checkpoints: Path, asynchronous: bool, victim: int, point: int) -> list[str]:
    """Save step 2 and prune step 1; `victim` gets a SIGKILL just before its `point`-th change to the disk, 0 = never.

    Returns:
        the changes of this rank. The file `<rank>.end` next to the checkpoints says how a survivor ended.
    """
    rank = dist.get_rank()
    held = jobs[rank]
    saver = held.saver(checkpoints, asynchronous=asynchronous, keep_last=1)
    with _counted(checkpoints, point if rank == victim else 0) as changes:
        end = "saved"
        try:
            held.save(saver, 2)
            saver.wait()
        except Exception as error:
            end = f"{type(error).__name__}: {error}"
    (checkpoints.parent / f"{rank}.end").write_text(end)
    return changes


@contextmanager
def _counted(below: Path, point: int) -> Iterator[list[str]]:
    """Record this process's disk changes below a folder as texts; kill it just before the `point`-th change."""
    changes: list[str] = []

    def reach(what: str, path: Any) -> None:
        changes.append(f"{what} {_in_words(str(path), below)}")
        if len(changes) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        """Python's audit events cover every change except those of `_COUNTED_CALLS`."""
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        path = str(arguments[0]) if writes or event in CHANGES else ""
        if path.startswith(str(below)) or (event in REMOVALS and not path.startswith("/")):
            reach(event, path)

    originals = {name: getattr(os, name) for name in _COUNTED_CALLS}

    def counted(name: str) -> Any:
        def call(descriptor: int, *arguments: Any) -> Any:
            reach(name, os.readlink(f"/proc/self/fd/{descriptor}"))
            return originals[name](descriptor, *arguments)

        return call

    sys.addaudithook(hook)  # an audit hook cannot be removed; this process has nothing else to count
    for name in originals:
        setattr(os, name, counted(name))
    try:
        yield changes
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


_COUNTED_CALLS = ("pwrite", "fsync", "posix_fallocate")


def _in_words(path: str, below: Path) -> str:
    """The path without the parts that differ between files of a kind, so that each kind of change has one name."""
    name = path.removeprefix(str(below)).strip("/") or "checkpoints"
    name = re.sub(r"-\d+-of-\d+|_sq", "", name)
    return name.replace(f".{folder_name(2)}.incomplete", "new")


@dataclass(frozen=True)
class FullDisk:
    error: str | None
    """The error of a save that had enough space until it began."""
    left: list[str]
    """Files in the folder after that."""
    before: Found
    """What is loaded while the disk is still full."""
    too_little: str | None
    """The error of a save that begins on a full disk."""
    after: Found
    """What is loaded after space was freed and the step was saved again."""


def full_disk_rank(jobs: Sequence[Held], disk: Path, asynchronous: bool) -> FullDisk:
    """The disk fills up between the check for free space and the first file."""
    held, checkpoints, ballast = jobs[dist.get_rank()], disk / "checkpoints", disk / "ballast"
    saver = held.saver(checkpoints, asynchronous=asynchronous)
    held.save(saver, 1)
    saver.wait()
    begin = folders.begin

    def fill_and_begin(*arguments: Any) -> Path:
        _fill(ballast, but_for=50_000)
        return begin(*arguments)

    with mock.patch.object(folders, "begin", fill_and_begin):
        error = _error_of_save(held, saver, 2)
    left = sorted(path.name for path in checkpoints.iterdir())
    before, too_little = _found(held, checkpoints), _error_of_save(held, saver, 2)
    dist.barrier()
    ballast.unlink(missing_ok=True)
    dist.barrier()
    held.save(saver, 2)
    saver.wait()
    return FullDisk(error, left, before, too_little, _found(held, checkpoints))


def _fill(path: Path, but_for: int) -> None:
    """`but_for`: number of bytes to leave free."""
    size = shutil.disk_usage(path.parent).free - but_for
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def _error_of_save(held: Held, saver: Saver, step: int) -> str | None:
    try:
        held.save(saver, step)
        saver.wait()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def failing_saves_rank(
    jobs: Sequence[Held], checkpoints: Path, fault: Exception | None
) -> tuple[str | None, list[str], list[int]]:
    """A background save in which rank 1 raises the fault, followed by another save.

    Returns:
        the error that the second `save` raised; the files left then; the steps that were saved by a further attempt
    """
    held = jobs[dist.get_rank()]
    saver = held.saver(checkpoints, asynchronous=True)
    failed = threading.Event()
    saver.on_failure = failed.set

    def write(*arguments: Any) -> None:
        if fault is not None and dist.get_rank() == 1:
            raise fault
        tensor_files.write(*arguments)

    with mock.patch.object(saving, "write", write):
        held.save(saver, 1)
        if fault is not None:
            assert failed.wait(60), "nobody is told before the next save"
        error = _error_of_save(held, saver, 2)
    dist.barrier()  # after this the writing rank has cleaned up
    left = sorted(path.name for path in checkpoints.glob("*"))
    dist.barrier()
    if fault is not None:
        held.save(saver, 2)
        saver.wait()
    return error, left, [report.step for report in saver.reports]


def queued_saves_rank(jobs: Sequence[Held], checkpoints: Path) -> tuple[list[str], list[int], Found]:
    """Save step 1, delayed until step 2 is to be saved; then save step 2 a second time.

    Returns:
        what happened, in order; the steps that were saved; what is loaded at the end
    """
    held, events, release = jobs[dist.get_rank()], list[str](), threading.Event()
    saver = held.saver(checkpoints, asynchronous=True)
    wait = saver.wait

    def wait_for_first() -> None:
        events.append("the second save waits")
        release.set()
        wait()

    def write(temporary: Path, *arguments: Any) -> None:
        release.wait(60)
        complete = ", ".join(path.name for path in sorted(checkpoints.glob("step_*")))
        events.append(f"{temporary.name} is written beside {complete or 'nothing'}")
        tensor_files.write(temporary, *arguments)

    with mock.patch.object(saving, "write", write):
        held.save(saver, 1)
        events.append("the first save has returned")
        with mock.patch.object(saver, "wait", wait_for_first):
            held.save(saver, 2)
        held.save(saver, 2)
        saver.wait()
    return list(dict.fromkeys(events)), [report.step for report in saver.reports], _found(held, checkpoints)
