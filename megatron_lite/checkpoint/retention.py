"""Which checkpoints of a run are kept, and the removal of the others. Needs no torch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.checkpoint.folder import candidates, explained, is_foreign, quick_problem, remove, step_of
from megatron_lite.checkpoint.state import read_state


@dataclass(frozen=True)
class Saved:
    """The facts that decide whether a checkpoint is kept."""

    step: int
    validation_loss: float | None = None  # None = the run was not validated after this step
    complete: bool = True


@dataclass(frozen=True)
class Kept:
    """The settings of the same names in `train.`."""

    keep_last: int  # number of newest ones; 0 = all
    keep_every: int  # multiples of this many steps are kept forever; 0 = none
    keep_best: int  # number of those with the lowest validation loss; 0 = none


def to_drop(saved: Sequence[Saved], kept: Kept, newest_step: int) -> list[int]:
    """The steps whose checkpoints to remove, in ascending order; never `newest_step`.

    Damaged checkpoints do not count towards keep_last, and are removed once they are older than the newest ones.
    Checkpoints after `newest_step` are always removed: they were damaged and skipped by the resume, and will be
    written again.
    """
    later = {one.step for one in saved if one.step > newest_step}
    earlier = sorted((one for one in saved if one.step <= newest_step), key=lambda one: one.step)
    if kept.keep_last == 0:
        return sorted(later)
    complete = [one for one in earlier if one.complete]
    oldest = min([newest_step, *(one.step for one in complete[-kept.keep_last :])])
    stays = {one.step for one in earlier if one.step >= oldest}
    stays |= {one.step for one in complete if kept.keep_every and one.step % kept.keep_every == 0}
    stays |= _best(complete, kept.keep_best)
    return sorted({one.step for one in saved} - stays)


def prune(checkpoints: Path, kept: Kept, newest_step: int) -> list[Path]:
    """Remove the checkpoints of `to_drop` and return their former paths. Only for the writing rank.

    Checkpoints of another version of megatron_lite are kept, whatever their step.

    Raises:
        CheckpointError: the system refuses to remove one.
    """
    folders = {step_of(folder): folder for folder in candidates(checkpoints) if not is_foreign(folder)}
    dropped = [folders[step] for step in to_drop([examine(folder) for folder in folders.values()], kept, newest_step)]
    drop(dropped)
    return dropped


def drop(folders: Sequence[Path]) -> None:
    """Remove checkpoints.

    Raises:
        CheckpointError: the system refuses.
    """
    for folder in folders:
        hidden = folder.with_name(f".{folder.name.removeprefix('.')}.removing")
        with explained(folder), contextlib.suppress(FileNotFoundError):  # another process removes it
            # Hide it first: an interrupted removal must not leave a folder that looks complete.
            remove(folder.rename(hidden))


def examine(folder: Path) -> Saved:
    """The facts about a checkpoint, from file sizes and its state; tensors are not read."""
    if quick_problem(folder) is not None:
        return Saved(step_of(folder), complete=False)
    return Saved(step_of(folder), read_state(folder).validation_loss)


def _best(saved: Sequence[Saved], count: int) -> set[int]:
    """The steps with the lowest validation losses; later steps win ties."""
    known = [
        (one.validation_loss, -one.step)
        for one in saved
        if one.validation_loss is not None and math.isfinite(one.validation_loss)
    ]
    return {-negative_step for _, negative_step in sorted(known)[:count]}
