"""Checkpoints for the same layout: DeepSpeed's own files, made crash-safe.

A checkpoint is a folder `checkpoints/step_00000100` that appears by one rename when everything in it, the manifest
with each file's size and hash included, is on disk. Whatever is incomplete never has that name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from megatron_lite.errors import CheckpointError
from megatron_lite.files import file_xxh3, sync

MANIFEST = "manifest.json"
STATE_TAG = "deepspeed"
_PREFIX = "step_"


class Saveable(Protocol):
    """What a checkpoint needs of an engine: both calls are collectives of all ranks."""

    def save(self, folder: Path, tag: str) -> None: ...

    def load(self, folder: Path, tag: str) -> None: ...


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint was made by, and hence what it can be resumed by."""

    step: int
    data_parallel_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    zero_stage: int
    precision: str
    data_fingerprint: str

    def at_step(self, step: int) -> CheckpointInfo:
        return replace(self, step=step)

    def differences(self, other: CheckpointInfo) -> list[str]:
        """What stands against resuming `other`'s run from this checkpoint, one sentence a reason."""
        return [
            f"{name}: the checkpoint has {mine}, this run {theirs}"
            for name, mine, theirs in zip(asdict(self), asdict(self).values(), asdict(other).values(), strict=True)
            if name != "step" and mine != theirs
        ]


def checkpoint_name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def save(engine: Saveable, checkpoints: Path, info: CheckpointInfo, *, keep_last: int) -> Path:
    """Write one checkpoint, then drop the older ones beyond `keep_last` (0 = keep all). A collective of all ranks.

    Returns:
        the published folder
    Raises:
        CheckpointError: the files cannot be written.
    """
    final = checkpoints / checkpoint_name(info.step)
    temporary = checkpoints / f".{final.name}.incomplete"
    is_writer = dist.get_rank() == 0
    try:
        if is_writer:
            for leftover in checkpoints.glob(f".{_PREFIX}*"):  # of a save or a removal that was killed
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
        dist.barrier()
        engine.save(temporary, STATE_TAG)
        dist.barrier()  # every rank's files are closed
        if is_writer:
            _publish(temporary, final, info)
            _prune(checkpoints, info.step, keep_last)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise CheckpointError(
            f"{final} cannot be written ({error}); free some space or mend its permissions: the same command resumes "
            "from the last complete checkpoint"
        ) from error
    dist.barrier()
    return final


def newest_complete(checkpoints: Path, report: Callable[[str], None]) -> tuple[Path, CheckpointInfo] | None:
    """The last checkpoint whose files are all as its manifest says; reports each one that it skips, and why."""
    for folder in sorted(checkpoints.glob(f"{_PREFIX}*"), reverse=True):
        problem = verify(folder)
        if problem is None:
            return folder, _read_info(folder)
        report(f"Skipping checkpoint {folder.name}: {problem}")
    return None


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        files = _read_manifest(folder)["files"]
        _read_info(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read ({error})"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} is {path.stat().st_size:,} bytes; the manifest says {expected['bytes']:,}"
        if file_xxh3(path) != expected["xxh3"]:
            return f"{name} has other content than the manifest says"
    return None


def require_fit(folder: Path, found: CheckpointInfo, current: CheckpointInfo) -> None:
    """
    Raises:
        CheckpointError: the checkpoint is of another layout, precision or data set.
    """
    differences = found.differences(current)
    if differences:
        raise CheckpointError(
            f"{folder} does not fit this run:\n  " + "\n  ".join(differences) + "\n"
            "resume with these settings, or start afresh with another train.run_dir"
        )


def load(engine: Saveable, folder: Path) -> None:
    """Restore weights, optimizer and loss scale. A collective of all ranks."""
    engine.load(folder, STATE_TAG)


def _publish(temporary: Path, final: Path, info: CheckpointInfo) -> None:
    files = {}
    for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
        sync(path)
        files[str(path.relative_to(temporary))] = {"bytes": path.stat().st_size, "xxh3": file_xxh3(path)}
    manifest = temporary / MANIFEST
    manifest.write_text(json.dumps({"info": asdict(info), "files": files}, indent=1))
    sync(manifest)
    for folder in (path for path in temporary.rglob("*") if path.is_dir()):
        sync(folder)
    sync(temporary)
    if final.exists():
        shutil.rmtree(final)  # a damaged one of the same step, which the resume skipped
    temporary.rename(final)
    sync(final.parent)


def _prune(checkpoints: Path, step: int, keep_last: int) -> None:
    """Drop what is older than the `keep_last` newest, and what is newer than `step`: it was damaged and passed over."""
    folders = sorted(checkpoints.glob(f"{_PREFIX}*"))
    valid = [folder for folder in folders if folder.name <= checkpoint_name(step)]
    kept = valid[-keep_last:] if keep_last else valid
    for folder in folders:
        if folder not in kept:
            # Out of sight first: a removal that is cut short must not leave a folder that looks whole.
            shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.removing")))


def _read_manifest(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def _read_info(folder: Path) -> CheckpointInfo:
    return CheckpointInfo(**_read_manifest(folder)["info"])
