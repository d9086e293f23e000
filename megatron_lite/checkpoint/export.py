"""Export a checkpoint's weights as a Hugging Face folder, after checking that transformers computes the same logits."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_lite.checkpoint.folder import newest_complete, problem, read_manifest
from megatron_lite.checkpoint.inspection import candidates_of, checkpoints_of, is_checkpoint, verify_command
from megatron_lite.checkpoint.parity import Parity, compare, require_transformers
from megatron_lite.checkpoint.state import CheckpointState, read_state
from megatron_lite.config.derived import has_next_sentence_head, resolve
from megatron_lite.config.frozen import from_containers
from megatron_lite.config.hf import NoCounterpart, hf_config
from megatron_lite.config.hf.folder import CONFIG_FILE, TRAINING
from megatron_lite.config.hf.headers import INDEX_FILE, tensors_of
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.data.special import SpecialTokens
from megatron_lite.data.tokenizer.tokenizer import open_tokenizer
from megatron_lite.data.tokenizer.tokenizer_files import TOKENIZER_FILE
from megatron_lite.errors import CheckpointError, ConfigError, DamagedFileError, library_edge
from megatron_lite.files import sync
from megatron_lite.modes import masked
from megatron_lite.state_files import Object, read_object

ANOTHER = "export another checkpoint of the run"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Exported:
    """The result of `export`."""

    source: Path
    step: int
    bytes: int
    parity: Parity


def export(path: Path, out: Path, dtype: str, report: Callable[[str], None]) -> Exported:
    """Write a checkpoint as a transformers model folder. The folder appears complete, or not at all.

    Args:
        path: a checkpoint, or a run folder or its checkpoints folder for the newest complete one.
        out: the folder to create.
        dtype: dtype of the written weights, one of DTYPES.
        report: called with a line for each skipped checkpoint of a run.
    Raises:
        CheckpointError: there is no complete checkpoint, transformers has no such model or is not installed, `out`
            exists or cannot be written, or transformers computes other logits from the folder than we do.
    """
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"OUT={out} exists, and export never overwrites; remove it, or give another folder")
    require_transformers("export checks its result with transformers")
    folder, state = _whole_checkpoint(path, report)
    config = _configuration(folder, state)
    _require_counterpart(folder, state, config)
    temporary = out.absolute().with_name(f".{out.absolute().name}.incomplete-{os.getpid()}")
    try:
        with masked([folder, *(folder / name for name in read_manifest(folder))], out):
            temporary.mkdir(parents=True)
            _write(folder, temporary, dtype)
        parity = compare(folder, temporary, config, DTYPES[dtype])
        _require_equal(parity, folder, out)
        size = _publish(temporary, out)
    except OSError as error:
        raise CheckpointError(
            f"OUT={out} cannot be written ({error}); free some space, or give another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(folder, state.step, size, parity)


def _whole_checkpoint(path: Path, report: Callable[[str], None]) -> tuple[Path, CheckpointState]:
    """Find a complete checkpoint; reads all its files."""
    if not candidates_of(path):
        raise CheckpointError(f"{path} holds no checkpoint; give a checkpoint, a run folder, or its checkpoints folder")
    if is_checkpoint(path):
        damage = problem(path)
        if damage is not None:
            raise CheckpointError(f"{path} is damaged: {damage}; {ANOTHER}")
        return path, read_state(path)
    found = newest_complete(checkpoints_of(path), report, problem)
    if found is None:
        raise CheckpointError(
            f"{path} holds no complete checkpoint; {verify_command(path)} shows what is wrong with each"
        )
    return found


def _configuration(folder: Path, state: CheckpointState) -> ResolvedConfig:
    try:
        return resolve(from_containers(state.config))
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}; export it with the version that wrote it") from error


def _require_counterpart(folder: Path, state: CheckpointState, config: ResolvedConfig) -> None:
    """
    Raises:
        CheckpointError: transformers has no such model (says why); the checkpoint then uses our own tensor names.
    """
    if state.hugging_face:
        return
    has_tokenizer = (folder / TOKENIZER_FILE).is_file()
    special = open_tokenizer(str(folder)).special if has_tokenizer else SpecialTokens()
    reason = "its weights have our own tensor names"
    try:
        hf_config(config.model, vocab_size=1, tokens=special, next_sentence=has_next_sentence_head(config))
    except NoCounterpart as found:
        reason = str(found)
    raise CheckpointError(
        f"{folder} has no counterpart in transformers: {reason}; go on with it here, by model.init_from={folder}"
    )


def _write(source: Path, target: Path, dtype: str) -> None:
    """Write the files of a model folder, without the training state; holds the tensors of one file at a time."""
    entries = tensors_of(source)
    files = sorted({entry.file for entry in entries.values()})
    total = sum(_convert(file, target / file.name, DTYPES[dtype]) for file in files)
    kept = [
        name
        for name in read_manifest(source)
        if not name.startswith(f"{TRAINING}/") and not name.endswith(".safetensors")
    ]
    for name in kept:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    _edit(target / CONFIG_FILE, lambda config: config | {"torch_dtype": dtype})
    if INDEX_FILE in kept:
        _edit(target / INDEX_FILE, lambda index: index | {"metadata": {"total_size": total}})


def _edit(file: Path, change: Callable[[Object], Object]) -> None:
    try:
        content = change(read_object(file, Object) or {})
    except DamagedFileError as error:
        raise CheckpointError(f"{error}; {ANOTHER}") from error
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _convert(source: Path, target: Path, dtype: torch.dtype) -> int:
    """Convert one file; return the bytes of the written tensors."""
    with library_edge(CheckpointError, f"{source} cannot be read", ANOTHER), safe_open(source, framework="pt") as file:
        tensors = {name: _rounded(file.get_tensor(name), dtype, name) for name in file.keys()}  # noqa: SIM118 - no mapping
    with library_edge(CheckpointError, f"{target} cannot be written", "free some space, or give another OUT"):
        save_file(tensors, target, metadata={"format": "pt"})
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """
    Raises:
        CheckpointError: a value is too large for the dtype.
    """
    rounded = tensor.to(dtype)
    if not rounded.isfinite().all():
        largest, kind = tensor.abs().max().item(), str(dtype).removeprefix("torch.")
        whole = dtype is torch.float16 and tensor.to(torch.bfloat16).isfinite().all()
        remedy = "use --dtype bfloat16" if whole else "export a checkpoint whose weights are finite"
        limit = torch.finfo(dtype).max
        raise CheckpointError(f"{name} holds {largest:.4g}, but the largest {kind} is {limit:.4g}; {remedy}")
    return rounded


def _require_equal(parity: Parity, folder: Path, out: Path) -> None:
    if parity.difference <= parity.allowed:  # false for NaN
        return
    raise CheckpointError(
        f"OUT={out} is not written: {parity.reader} computes {parity.outputs} from it that differ from ours by "
        f"{parity.difference:.3g}, but at most {parity.allowed:.3g} is allowed: it expects a tensor under another name "
        "or in another order, or computes differently; install the transformers of constraints.txt and export again; "
        f"if that does not help, report it: {folder} is undamaged, and training can continue from it"
    )


def _publish(temporary: Path, out: Path) -> int:
    """Make the folder visible once it is on the disk; return its size in bytes."""
    files = sorted(temporary.rglob("*"))
    size = sum(file.stat().st_size for file in files if file.is_file())
    for path in (*files, temporary):
        sync(path)
    temporary.rename(out)
    sync(out.absolute().parent)
    return size
