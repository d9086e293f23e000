"""Load checkpoints: each rank reads the slices that it needs, whatever layout saved them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_lite.checkpoint import folder as folders
from megatron_lite.checkpoint.file_plan import FilePlan, files_of
from megatron_lite.checkpoint.fit import fitting
from megatron_lite.checkpoint.fragments import Fragment, transfers
from megatron_lite.checkpoint.state import CheckpointState, read_state
from megatron_lite.checkpoint.tensor_files import TensorReader
from megatron_lite.config.hf.headers import TensorEntry, entries_of
from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.errors import CheckpointError
from megatron_lite.models.hf import locate
from megatron_lite.models.stored import StoredForm
from megatron_lite.parallel.agreement import agreed


def newest_complete(
    checkpoints: Path,
    report: Callable[[str], None],
    reason_against: Callable[[CheckpointState], str | None] = lambda state: None,
    *,
    required: bool = True,
) -> tuple[Path, CheckpointState] | None:
    """The newest checkpoint that is complete, verified byte by byte.

    A collective of all ranks, which divide the files among them.

    Args:
        report: called on the writing rank with a line for each skipped checkpoint.
        reason_against: called on the writing rank; returns why a checkpoint must not be used, or None.
        required: raise an error if there are checkpoints but none can be used.
    Raises:
        CheckpointError: there are checkpoints, but none is complete and usable; raised on every rank.
    """
    if dist.get_rank() == 0:
        check = partial(_problem_by_all_ranks, reason_against=reason_against)
        found = folders.newest_complete(checkpoints, report, check)
        agreed(None)  # tell the other ranks that the search is over
    else:
        while (folder := agreed(None)) is not None:
            _shared_problem(folder)
        found = None
    found, lost = agreed((found, required and found is None and bool(folders.candidates(checkpoints))))
    if lost:
        raise CheckpointError(
            f"{checkpoints} holds checkpoints, but none of them is complete; restore a complete one, or move them away "
            "to start from scratch (or give another train.run_dir)"
        )
    return found


def _problem_by_all_ranks(folder: Path, reason_against: Callable[[CheckpointState], str | None]) -> str | None:
    """Runs on the writing rank; the other ranks wait for the folder, and then verify it together."""
    problem = folders.quick_problem(folder) or reason_against(read_state(folder))
    if problem is None:
        agreed(folder)
        problem = _shared_problem(folder)
    return problem


def _shared_problem(folder: Path) -> str | None:
    try:
        names = sorted(folders.read_manifest(folder))[dist.get_rank() :: dist.get_world_size()]
        own = next(iter(folders.content_problems(folder, names)), None)
    except CheckpointError as error:
        own = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, own)
    return next((problem for problem in problems if problem is not None), None)


def require_complete(folder: Path) -> None:
    """Verify every byte of a checkpoint. A collective of all ranks, which divide the files among them.

    Raises:
        CheckpointError: a file is missing or damaged; raised on every rank.
    """
    problem = agreed(folders.quick_problem(folder) if dist.get_rank() == 0 else None) or _shared_problem(folder)
    if problem is not None:
        raise CheckpointError(f"{folder} is damaged: {problem}; restore an undamaged copy, or name another checkpoint")


def load(folder: Path, plan: FilePlan, fragments: Sequence[Fragment], kinds: Iterable[str]) -> None:
    """Fill this rank's fragments of these kinds from a checkpoint's files.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the model needs.
    """
    for kind in kinds:
        files = files_of(kind, folders.read_manifest(folder))
        entries = {name: entry for file in files for name, entry in entries_of(folder / file).items()}
        form = plan.sets[kind].form
        with TensorReader(locate(form, entries, str(folder))) as reader:
            reader.read(transfers([one for one in fragments if one.kind == kind], form))


def start_from(
    entries: Mapping[str, TensorEntry],
    form: StoredForm,
    weights: Sequence[Fragment],
    where: str,
    model: ResolvedModel | None,
) -> None:
    """Fill this rank's fragments of the weights from a model folder.

    Args:
        where: what is read, for messages.
        model: the model, if the files have transformers' names; None if they have ours.
    Raises:
        CheckpointError: a tensor is missing, left over, or has another shape than the model needs.
    """
    with TensorReader(fitting(form, entries, model, where)) as reader:
        reader.read(transfers(weights, form))
