"""Which checkpoints of a run are kept. Free of torch."""

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
    """What decides over one checkpoint."""

    step: int
    validation_loss: float | None = None  # None = the run was not validated after this step
    complete: bool = True


@dataclass(frozen=True)
class Kept:
    """Settings of the same names in `train.`."""

    keep_last: int  # newest ones; 0 = all
    keep_every: int  # steps whose multiples are kept for ever; 0 = none
    keep_best: int  # those with the lowest validation loss; 0 = none


def to_drop(saved: Sequence[Saved], kept: Kept, newest_step: int) -> list[int]:
    """The steps whose checkpoints go, in ascending order; never `newest_step`.

    Damaged ones take nobody's place among the newest, and go once they are older than all of those. What is newer than
    `newest_step` goes in any case: it was damaged and passed over when the run was resumed, and is to be made again.
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
    """Remove what `to_drop` names, and return those folders' former paths. For the writing rank alone.

    Checkpoints of another version of megatron_lite stay, whatever their step.

    Raises:
        CheckpointError: the system does not let us remove one.
    """
    folders = {step_of(folder): folder for folder in candidates(checkpoints) if not is_foreign(folder)}
    dropped = [folders[step] for step in to_drop([examine(folder) for folder in folders.values()], kept, newest_step)]
    drop(dropped)
    return dropped


def drop(folders: Sequence[Path]) -> None:
    """Remove checkpoints.

    Raises:
        CheckpointError: the system does not let us.
    """
    for folder in folders:
        hidden = folder.with_name(f".{folder.name.removeprefix('.')}.removing")
        with explained(folder), contextlib.suppress(FileNotFoundError):  # someone else removes it
            # Out of sight first: a removal that is cut short must not leave a folder that looks whole.
            remove(folder.rename(hidden))


def examine(folder: Path) -> Saved:
    """What a checkpoint's folder says of itself; its content is not read."""
    if quick_problem(folder) is not None:
        return Saved(step_of(folder), complete=False)
    return Saved(step_of(folder), read_state(folder).validation_loss)


def _best(saved: Sequence[Saved], count: int) -> set[int]:
    """Steps of the lowest validation losses; of equal ones the later."""
    known = [
        (one.validation_loss, -one.step)
        for one in saved
        if one.validation_loss is not None and math.isfinite(one.validation_loss)
    ]
    return {-negative_step for _, negative_step in sorted(known)[:count]}
