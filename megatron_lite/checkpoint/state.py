"""The state of a checkpoint besides tensors: `training/state.json`, readable without torch."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_lite.config.hf.folder import STATE_FILE as STATE_FILE
from megatron_lite.config.hf.folder import TRAINING as TRAINING
from megatron_lite.errors import CheckpointError, DamagedFileError, ForeignFormatError
from megatron_lite.observe.logged import LoggedLines
from megatron_lite.state_files import Object, decode, read_bytes

FORMAT = 1
_NAN_LOSS = re.compile(rb'^( "validation_loss": )(NaN|-?Infinity)(?=,$)', re.MULTILINE)
"""A non-finite loss as earlier versions wrote it, which is not valid JSON."""


@dataclass(frozen=True)
class Layout:
    """The parallel layout of the run that saved. The files do not depend on it."""

    data_parallel_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    zero_stage: int
    sequence_parallel: bool

    def __str__(self) -> str:
        text = f"dp{self.data_parallel_size} tp{self.tensor_parallel_size} pp{self.pipeline_parallel_size}"
        return f"{text} zero{self.zero_stage}" + (" sp" if self.sequence_parallel else "")


@dataclass(frozen=True)
class OptimizerState:
    name: str  # adamw, sgd, adafactor
    step: int  # number of updates, for Adam's bias correction; fewer than the run's steps if some were skipped
    moments: tuple[str, ...]  # exp_avg, exp_avg_sq; momentum_buffer; row, column, square. May be empty


@dataclass(frozen=True)
class LossScaleState:
    """The state of fp16's dynamic loss scale."""

    scale: float
    steps_since_change: int  # without overflow
    hysteresis_left: int


@dataclass(frozen=True)
class CheckpointState:
    step: int  # optimizer steps of the run, counted from 1
    samples: int  # consumed, not counting skipped ones
    layout: Layout
    precision: str
    optimizer: OptimizerState
    loss_scale: LossScaleState | None
    data_fingerprint: str
    hugging_face: bool
    """Whether the weights have transformers' names and shapes (with a config.json) or our own."""
    validation_loss: float | None  # if the run was validated after this very step
    skipped: tuple[tuple[int, int], ...] = ()
    """Global samples [first, stop) that the run had skipped so far, in ascending order."""
    config: dict[str, Any] = field(default_factory=dict)
    """The frozen configuration, as plain containers; used to restore a damaged file in the run folder."""
    metrics: LoggedLines | None = None
    """The state of metrics.jsonl at this step; None in checkpoints of earlier versions."""
    comparable_from: int = 1
    """First step whose loss and gradient norm can be compared with later ones: before it, a setting had a value that
    moves them."""
    versions: dict[str, str] = field(default_factory=dict)  # megatron_lite, torch, deepspeed, git commit

    def as_text(self) -> str:
        """As JSON. A non-finite validation loss becomes null, because JSON cannot represent it."""
        loss = self.validation_loss
        finite = loss if loss is not None and math.isfinite(loss) else None
        return json.dumps({"format": FORMAT, **asdict(self), "validation_loss": finite}, indent=1)


def read_state(folder: Path) -> CheckpointState:
    """
    Raises:
        CheckpointError: it is missing, damaged, or from a version that this one cannot read.
    """
    path = folder / STATE_FILE
    try:
        content = read_bytes(path)
        if content is None:
            raise CheckpointError(f"{folder} has no {STATE_FILE}, so it was never finished")
        content = _NAN_LOSS.sub(b"\\1null", content)
        require_format(decode(content, Format, str(path)).format, FORMAT, str(folder))
        state = decode(content, CheckpointState, str(path))
        unknown = decode(content, Object, str(path)).keys() - {"format", *(field.name for field in fields(state))}
    except DamagedFileError as error:
        raise CheckpointError(str(error)) from error
    if unknown:
        raise CheckpointError(
            f"{path} holds {', '.join(sorted(unknown))}, which this version of megatron_lite does not know; use the "
            "version that wrote it"
        )
    return state


@dataclass(frozen=True)
class Format:
    """The version field that every versioned file has."""

    format: int | str | None = None


def require_format(found: int | str | None, known: int, what: str) -> None:
    """
    Raises:
        ForeignFormatError: it has another format version than the one that we read.
    """
    if found != known:
        raise ForeignFormatError(
            f"{what} has format {found}, but this version of megatron_lite reads format {known}; "
            "use the version that wrote it"
        )
