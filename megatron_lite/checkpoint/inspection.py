"""Describe and compare checkpoints, for `python -m megatron_lite.checkpoint`. Needs no torch."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.folder import (
    MANIFEST,
    NAME,
    candidates,
    content_problems,
    newest_complete,
    quick_problem,
    quick_problems,
    read_manifest,
)
from megatron_lite.checkpoint.resume import same_data
from megatron_lite.checkpoint.state import (
    STATE_FILE,
    TRAINING,
    CheckpointState,
    LossScaleState,
    OptimizerState,
    read_state,
)
from megatron_lite.checkpoint.tensors import difference
from megatron_lite.config.changes import Change, grade_changes
from megatron_lite.config.frozen import from_containers
from megatron_lite.config.hf.headers import TensorEntry, entries_of
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.files import size_text

WEIGHTS = "weights"
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class TensorKind:
    """The files with tensors of one kind: weights, or one of the optimizer's moments."""

    name: str
    files: tuple[str, ...]
    bytes: int
    tensors: Mapping[str, TensorEntry]

    @property
    def elements(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def __str__(self) -> str:
        dtypes = ", ".join(sorted({tensor.dtype for tensor in self.tensors.values()})) or "empty"
        count = f"{len(self.files)} file{'s' if len(self.files) != 1 else ''}"
        return f"{size_text(self.bytes)} in {count}: {len(self.tensors)} tensors, {dtypes}"


@dataclass(frozen=True)
class Inspection:
    """A checkpoint as described by its file headers and its state."""

    folder: Path
    state: CheckpointState
    kinds: tuple[TensorKind, ...]
    other_files: tuple[str, ...]
    problem: str | None  # judged by file sizes only

    @property
    def parameters(self) -> int:
        return sum(kind.elements for kind in self.kinds if kind.name == WEIGHTS)

    def lines(self) -> Iterator[tuple[str, str]]:
        state, optimizer = self.state, self.state.optimizer
        yield "checkpoint", str(self.folder)
        yield "state", self.problem or "complete, judging by file sizes"
        yield "step", f"{state.step:,}, after {state.samples:,} samples"
        yield "saved by", f"{state.layout}, {state.precision}"
        moments = ", ".join(optimizer.moments) or "no moments"
        yield "optimizer", f"{optimizer.name} after {optimizer.step:,} updates: {moments}"
        if state.loss_scale is not None:
            yield "loss scale", f"{state.loss_scale.scale:,g}"
        if state.validation_loss is not None:
            yield "validation", f"loss {state.validation_loss:.4g}"
        yield "parameters", f"{self.parameters:,}"
        yield "names", "those of transformers" if state.hugging_face else "our own: transformers has no such model"
        for kind in self.kinds:
            yield kind.name, str(kind)
        yield "other files", ", ".join(self.other_files) or "none"
        yield "data", f"fingerprint {state.data_fingerprint}"
        yield "versions", ", ".join(f"{name} {version}" for name, version in state.versions.items()) or "unknown"

    def as_json(self, *, tensors: bool) -> dict[str, Any]:
        """For `--json`; sizes are in bytes."""
        state = {field.name: getattr(self.state, field.name) for field in fields(self.state)}
        nested = {name: asdict(state[name]) for name in ("layout", "optimizer")}
        nested["loss_scale"] = state["loss_scale"] and asdict(state["loss_scale"])
        return {
            "folder": str(self.folder),
            "problem": self.problem,
            "parameters": self.parameters,
            "state": state | nested,
            "kinds": {kind.name: _kind_as_json(kind, tensors) for kind in self.kinds},
            "other_files": list(self.other_files),
        }


def locate(path: Path) -> Path:
    """The checkpoint at a path: itself, or the newest complete one of a run folder or checkpoints folder.

    Raises:
        CheckpointError: there is none.
    """
    if not candidates_of(path):
        raise CheckpointError(f"{path} holds no checkpoint; give a checkpoint, a run folder, or its checkpoints folder")
    if is_checkpoint(path):
        return path
    skipped: list[str] = []
    found = newest_complete(checkpoints_of(path), skipped.append, quick_problem)
    if found is None:
        raise CheckpointError("\n".join([f"{path} holds no complete checkpoint; name one to inspect it", *skipped]))
    return found[0]


def candidates_of(path: Path) -> list[Path]:
    """A checkpoint itself, or those in a run folder or checkpoints folder, newest first."""
    return [path] if is_checkpoint(path) else candidates(checkpoints_of(path))


def is_checkpoint(path: Path) -> bool:
    known = (path / MANIFEST).exists() or (path / STATE_FILE).exists()
    return known or (NAME.fullmatch(path.absolute().name) is not None and path.is_dir())


def checkpoints_of(path: Path) -> Path:
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def verify_command(path: Path) -> str:
    """For messages: how to see all problems of the checkpoints at a path."""
    return f"`python -m megatron_lite.checkpoint verify {shlex.quote(str(path))}`"


def inspect(folder: Path) -> Inspection:
    """
    Raises:
        CheckpointError: its state or the header of a file cannot be read.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    kinds: dict[str, list[str]] = {}
    for name in names:
        if name.endswith(SUFFIX):
            kinds.setdefault(_kind_of(name), []).append(name)
    return Inspection(
        folder,
        read_state(folder),
        tuple(_kind(folder, kind, files) for kind, files in kinds.items()),
        tuple(name for name in names if not name.endswith(SUFFIX)),
        quick_problem(folder),
    )


def all_problems(folder: Path) -> list[str]:
    """Everything that is wrong with a checkpoint; reads every byte of it."""
    found = list(quick_problems(folder))
    try:
        names = read_manifest(folder)
    except CheckpointError:
        return found
    wrong = {name for name in names for problem in found if problem.startswith(f"{name} ")}
    return found + content_problems(folder, [name for name in names if name not in wrong])


def setting_changes(one: Inspection, other: Inspection) -> list[Change]:
    """
    Raises:
        CheckpointError: a configuration is from a version that this one cannot read.
    """
    same = same_data(one.state.data_fingerprint, other.state.data_fingerprint)
    return grade_changes(_configuration(one), _configuration(other), same=same)


def state_differences(one: CheckpointState, other: CheckpointState) -> list[str]:
    """Differences of all fields except the settings."""
    names = [field.name for field in fields(CheckpointState) if field.name != "config"]
    pairs = ((name, getattr(one, name), getattr(other, name)) for name in names)
    return [f"{name}: {_in_words(mine)} -> {_in_words(theirs)}" for name, mine, theirs in pairs if mine != theirs]


def tensor_differences(one: Inspection, other: Inspection) -> Iterator[tuple[str, str | None]]:
    """Each tensor of either checkpoint, as `kind: name`, and how the two differ; None = bitwise equal.

    Raises:
        CheckpointError: a file is damaged.
    """
    first, second = _by_name(one.kinds), _by_name(other.kinds)
    for name in first | second:
        if name not in second:
            yield name, "only in the first"
        elif name not in first:
            yield name, "only in the second"
        else:
            yield name, difference(first[name], second[name])


def _in_words(value: Any) -> str:
    """A field of the state as text."""
    if isinstance(value, OptimizerState | LossScaleState):
        value = asdict(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_in_words(entry)}" for name, entry in value.items()) or "none"
    if isinstance(value, tuple):
        return "+".join(value) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _configuration(found: Inspection) -> RunConfig:
    try:
        return from_containers(found.state.config)
    except ConfigError as error:
        raise CheckpointError(f"{found.folder}: {error}; compare with --only-tensors") from error


def _kind_of(name: str) -> str:
    """`exp_avg` for `training/exp_avg-00001-of-00002.safetensors`; `weights` for files outside `training/`."""
    folder, _, file = name.rpartition("/")
    return file.removesuffix(SUFFIX).partition("-")[0] if folder == TRAINING else WEIGHTS


def _kind(folder: Path, name: str, files: Sequence[str]) -> TensorKind:
    tensors = {tensor: entry for file in files for tensor, entry in entries_of(folder / file).items()}
    return TensorKind(name, tuple(files), sum((folder / file).stat().st_size for file in files), tensors)


def _kind_as_json(kind: TensorKind, tensors: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"files": list(kind.files), "bytes": kind.bytes}
    if tensors:
        content["tensors"] = {
            name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "file": tensor.file.name}
            for name, tensor in kind.tensors.items()
        }
    return content


def _by_name(kinds: Sequence[TensorKind]) -> dict[str, TensorEntry]:
    """Tensors by `kind: name`: moments have the names of their parameters."""
    return {f"{kind.name}: {name}": tensor for kind in kinds for name, tensor in kind.tensors.items()}
