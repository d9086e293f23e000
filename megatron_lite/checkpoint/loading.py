"""Loading: each rank reads the slices that it needs, whatever layout has saved them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_lite.checkpoint import folder as folders
from megatron_lite.checkpoint.fragments import Fragment, transfers
from megatron_lite.checkpoint.plan import Plan, files_of
from megatron_lite.checkpoint.state import CheckpointState
from megatron_lite.checkpoint.tensor_files import TensorReader
from megatron_lite.config.hf.headers import TensorEntry, entries_of
from megatron_lite.errors import CheckpointError
from megatron_lite.models.hf import find_name
from megatron_lite.models.stored import StoredForm
from megatron_lite.parallel.agreement import agreed


def newest_complete(checkpoints: Path, report: Callable[[str], None]) -> tuple[Path, CheckpointState] | None:
    """The newest checkpoint of which every byte is as it was written. A collective of all ranks, who share the reading.

    Args:
        report: is told on the writing rank of each checkpoint that is skipped, and why.
    """
    is_writer = dist.get_rank() == 0
    if is_writer:
        found = folders.newest_complete(checkpoints, report, _problem_by_all_ranks)
        agreed(None)  # no more to read
        return agreed(found)
    while (folder := agreed(None)) is not None:
        _shared_problem(folder)
    return agreed(None)


def _problem_by_all_ranks(folder: Path) -> str | None:
    """On the writing rank, while the others wait for a folder to read with it."""
    problem = folders.quick_problem(folder)
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


def load(folder: Path, plan: Plan, fragments: Sequence[Fragment], kinds: Iterable[str]) -> None:
    """Fill this rank's fragments of these kinds from a checkpoint's files.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the model needs.
    """
    for kind in kinds:
        files = files_of(kind, folders.read_manifest(folder))
        entries = {name: entry for file in files for name, entry in entries_of(folder / file).items()}
        _read(entries, plan.sets[kind].form, [one for one in fragments if one.kind == kind], {})


def start_from(entries: Mapping[str, TensorEntry], form: StoredForm, fragments: Sequence[Fragment]) -> None:
    """Fill this rank's fragments of the weights from a model folder of transformers, or one like it.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the model needs.
    """
    found = {name: find_name(name, entries) for name in form.shapes}
    _read(entries, form, fragments, {name: other for name, other in found.items() if other is not None})


def _read(
    entries: Mapping[str, TensorEntry], form: StoredForm, fragments: Sequence[Fragment], names: Mapping[str, str]
) -> None:
    """`names`: of tensors that the files call otherwise than the form."""
    needed = {piece.target for piece in form.pieces}  # what no box covers is zero, and may as well be missing
    wrong = [
        f"{name}: {entry.shape if entry else 'missing'} in the files, {shape} in the model"
        for name, shape in form.shapes.items()
        for entry in [entries.get(names.get(name, name))]
        if name in needed and (entry is None or entry.shape != shape)
    ]
    if wrong:
        raise CheckpointError("the tensors in the files are not those of the model: " + "; ".join(wrong))
    with TensorReader(sorted({entry.file for entry in entries.values()})) as reader:
        reader.read(transfers(fragments, form), names)
