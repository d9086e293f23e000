"""Save checkpoints: every rank writes the elements that it owns; then one rank publishes the folder.

An asynchronous save runs in a thread of each rank, from a copy in host memory, while training continues. The threads
use a separate gloo process group, so that their collectives cannot interleave with those of training.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.checkpoint import folder as folders
from megatron_lite.checkpoint.file_plan import FilePlan
from megatron_lite.checkpoint.folder import FileRecord
from megatron_lite.checkpoint.fragments import Fragment, transfers
from megatron_lite.checkpoint.host_memory import page_locked
from megatron_lite.checkpoint.retention import Kept, prune
from megatron_lite.checkpoint.state import STATE_FILE, CheckpointState
from megatron_lite.checkpoint.tensor_files import write
from megatron_lite.config.hf.headers import INDEX_FILE
from megatron_lite.errors import CheckpointError, DeviceMemoryError, DiskError
from megatron_lite.faults import Fault, fault_of
from megatron_lite.files import file_xxh3

T = TypeVar("T")
Answer = tuple[CheckpointError | DeviceMemoryError | DiskError | None, T | None]
"""The answer of one rank: why it failed, or its result."""


@dataclass(frozen=True)
class SaveReport:
    """Timing and size of one save."""

    step: int
    folder: Path
    stall_seconds: float  # how long training waited
    total_seconds: float  # until the folder was published
    bytes: int  # total size of its tensor files


class Saver:
    """Writes the checkpoints of one run, one at a time. Call every method on all ranks."""

    def __init__(
        self,
        checkpoints: Path,
        plan: FilePlan,
        documents: Mapping[str, bytes],
        kept: Kept,
        *,
        asynchronous: bool,
        on_failure: Callable[[], None] = lambda: None,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            documents: file name -> content of the other files in each checkpoint: config.json, the tokenizer.
            asynchronous: `save` returns as soon as the rank's memory is copied.
            on_failure: called by the saving thread as soon as a save has failed; `wait` then raises the error.
            guard: called on the writing rank before each change to the folder; raises if another attempt owns the run.
        """
        self._guard = guard
        self.checkpoints, self.plan, self.kept = checkpoints, plan, kept
        self.documents = dict(documents)
        if plan.index is not None:
            self.documents[INDEX_FILE] = plan.index.encode()
        self.asynchronous, self.on_failure = asynchronous, on_failure
        self.reports: list[SaveReport] = []
        """Reports of the completed saves, oldest first; the reader may clear the list."""
        self._group = dist.new_group(backend="gloo")
        self._is_writer = dist.get_rank() == 0
        self._host_copy: Tensor | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, fragments: Sequence[Fragment], state: CheckpointState) -> Path:
        """Write a checkpoint, or start to; waits for the previous save first. A collective of all ranks.

        Returns:
            the future folder of the checkpoint
        Raises:
            CheckpointError, DiskError: this save or the previous one failed; raised on every rank.
            RuntimeError: another rank has ended.
        """
        began = time.perf_counter()
        self.wait()
        final = self.checkpoints / folders.folder_name(state.step)
        if not self.asynchronous:
            self._write([one.of_owned(one.owned_values) for one in fragments], state, began, None)
            self._raise()
            return final
        copies = self._copied(fragments)
        arguments = (copies, state, began, time.perf_counter() - began)
        # Not a daemon thread: the interpreter waits at exit until the checkpoint is written.
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        self._thread.start()
        return final

    def finish(self) -> str | None:
        """Wait for the current save when a run has failed: its checkpoint is still useful.

        Returns:
            why the save failed, or None
        """
        try:
            self.wait()
        except Exception as error:  # must not hide why the run has failed
            return str(error)
        return None

    def wait(self) -> None:
        """Wait until the current save is finished.

        Raises:
            CheckpointError, DiskError: the save failed; raised on every rank.
            RuntimeError: another rank has ended.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _require_space(self) -> None:
        needed = self.plan.bytes + sum(map(len, self.documents.values()))
        folders.require_space(self.checkpoints, needed)

    def _copied(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        """Copy the owned values to host memory. Later saves reuse the buffer, whose pages are then already mapped."""
        sizes = [one.owned_values.numel() for one in fragments]
        if self._host_copy is None or self._host_copy.numel() != sum(sizes):
            on_gpu = any(one.values.is_cuda for one in fragments)
            self._host_copy = None  # before the next one is allocated
            self._host_copy = page_locked(sum(sizes)) if on_gpu else torch.empty(sum(sizes), dtype=torch.float32)
        parts = self._host_copy.split(sizes)
        for one, part in zip(fragments, parts, strict=True):
            part.copy_(one.owned_values, non_blocking=one.values.is_cuda)
        if any(one.values.is_cuda for one in fragments):
            torch.cuda.synchronize()
        return [one.of_owned(part) for one, part in zip(fragments, parts, strict=True)]

    def _write(
        self, fragments: Sequence[Fragment], state: CheckpointState, began: float, stall_seconds: float | None
    ) -> None:
        """`stall_seconds`: None = training waits for the whole save."""
        temporary = self.checkpoints / f".{folders.folder_name(state.step)}.incomplete"
        try:
            self._together(self._require_space, by_writer=True)
            self._together(lambda: self._begin(state), by_writer=True)
            self._together(lambda: self._write_tensors(temporary, fragments))
            hashes = self._together(lambda: self._hash_share(temporary))
            records = {name: record for share in hashes for name, record in (share or {}).items()}
            self._together(lambda: folders.publish(temporary, records), by_writer=True)
            self._together(lambda: prune(self.checkpoints, self.kept, state.step), by_writer=True)
        except Exception as error:  # kept for `wait`: an error lost in a thread would look like a finished save
            self._error = error
            if self._is_writer:
                folders.abandon(temporary)
            self.on_failure()
            return
        total = time.perf_counter() - began
        final = self.checkpoints / folders.folder_name(state.step)
        stall = total if stall_seconds is None else stall_seconds
        self.reports.append(SaveReport(state.step, final, stall, total, self.plan.bytes))

    def _begin(self, state: CheckpointState) -> None:
        temporary = folders.begin(self.checkpoints, state.step)
        for file in self.plan.files:
            file.create(temporary)
        for name, content in self.documents.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(content)
        (temporary / STATE_FILE).write_text(state.as_text())

    def _write_tensors(self, temporary: Path, fragments: Sequence[Fragment]) -> None:
        for kind, tensors in self.plan.sets.items():
            own = [one for one in fragments if one.kind == kind and one.values.numel()]
            write(temporary, tensors.files, transfers(own, tensors.form))

    def _hash_share(self, temporary: Path) -> dict[str, FileRecord]:
        """Hash every world-size-th file as read back from the disk, whichever ranks wrote it."""
        own = self.plan.files[dist.get_rank() :: dist.get_world_size()]
        return {file.name: FileRecord(file.size_bytes, file_xxh3(temporary / file.name)) for file in own}

    def _together(self, do: Callable[[], T], *, by_writer: bool = False) -> list[T | None]:
        """Run one stage of a save on every rank, or only on the writing rank; return when all ranks are done.

        Every rank takes part in the collective even if its stage failed, so that no rank waits forever.

        Returns:
            the result of each rank
        Raises:
            CheckpointError, DeviceMemoryError, DiskError: the stage failed on some rank; raised on every rank, except
                that a rank with an unexpected exception raises that one.
            RuntimeError: another rank has ended. The user cannot fix this here; that rank's own error says more.
        """
        answer: Answer[T] = (None, None)
        fault: Exception | None = None
        try:
            if self._is_writer:
                self._guard()
            if self._is_writer or not by_writer:
                with folders.explained(self.checkpoints):
                    answer = (None, do())
        except (CheckpointError, DiskError) as error:
            answer = (error, None)
        except Exception as error:  # a bug of ours; the other ranks must not wait for this one
            text = f"rank {dist.get_rank()} failed to write a checkpoint: {error!r}"
            is_memory = fault_of(error) is Fault.memory
            fault, answer = error, (DeviceMemoryError(text) if is_memory else CheckpointError(text), None)
        answers: list[Answer[T]] = [(None, None)] * dist.get_world_size()
        try:
            dist.all_gather_object(answers, answer, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(f"a checkpoint was not finished, because another rank has ended ({error})") from error
        if fault is not None:
            raise fault
        errors = [error for error, _ in answers if error is not None]
        if errors:
            raise errors[0]
        return [given for _, given in answers]
