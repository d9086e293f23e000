"""What a checkpoint holds besides tensors: `training/state.json`, readable without torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_lite.config.hf.folder import STATE_FILE as STATE_FILE
from megatron_lite.config.hf.folder import TRAINING as TRAINING
from megatron_lite.errors import CheckpointError, ForeignFormatError
from megatron_lite.observe.logged import LoggedLines

FORMAT = 1


@dataclass(frozen=True)
class Layout:
    """How the run that saved was cut up; tells nothing about the files, which are the same for all."""

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
    step: int  # updates made, of which Adam's bias correction depends; fewer than the run's steps if some were skipped
    moments: tuple[str, ...]  # exp_avg, exp_avg_sq; momentum_buffer; row, column, square. May be empty


@dataclass(frozen=True)
class LossScaleState:
    """Of fp16's dynamic loss scale."""

    scale: float
    steps_since_change: int  # without overflow
    hysteresis_left: int


@dataclass(frozen=True)
class CheckpointState:
    step: int  # optimizer steps of the run, counted from 1
    samples: int  # consumed, without those that the run had left out
    layout: Layout
    precision: str
    optimizer: OptimizerState
    loss_scale: LossScaleState | None
    data_fingerprint: str
    hugging_face: bool
    """The weights have the names and shapes of transformers, and config.json lies beside them; otherwise ours."""
    validation_loss: float | None  # if the run was validated after this very step
    skipped: tuple[tuple[int, int], ...] = ()
    """Global samples [first, stop) that the run had left out until then, in ascending order."""
    config: dict[str, Any] = field(default_factory=dict)
    """The frozen configuration, as plain containers; restores the file in the run folder, should it be damaged."""
    metrics: LoggedLines | None = None
    """Of metrics.jsonl up to this step; None in checkpoints of earlier versions."""
    versions: dict[str, str] = field(default_factory=dict)  # megatron_lite, torch, deepspeed, git commit

    def as_text(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)


def read_state(folder: Path) -> CheckpointState:
    """
    Raises:
        CheckpointError: it is missing, damaged, or of a version that this one cannot read.
    """
    try:
        found = json.loads((folder / STATE_FILE).read_text())
        version = found.pop("format")
        if version != FORMAT:
            raise ForeignFormatError(
                f"{folder} has format {version}, and this version of megatron_lite reads format {FORMAT}; "
                "go on with the version that wrote it"
            )
        optimizer = found.pop("optimizer")
        scale, metrics = found.pop("loss_scale"), found.pop("metrics", None)
        return CheckpointState(
            layout=Layout(**found.pop("layout")),
            optimizer=OptimizerState(optimizer["name"], optimizer["step"], tuple(optimizer["moments"])),
            loss_scale=None if scale is None else LossScaleState(**scale),
            metrics=None if metrics is None else _logged(metrics),
            skipped=tuple((first, stop) for first, stop in found.pop("skipped", ())),
            **found,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / STATE_FILE} cannot be read ({error})") from error


def _logged(found: dict[str, Any]) -> LoggedLines:
    steps = tuple((first, last, every) for first, last, every in found.pop("steps"))
    return LoggedLines(**found, steps=steps)
