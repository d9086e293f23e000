"""TensorBoard event files in `<run>/tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_lite.observe.trackers import numbers


class TensorBoardTracker:
    """Scalars by step; those of an earlier attempt beyond `resume_step` are hidden by TensorBoard's purge step."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        purge_step = resume_step + 1 if resume_step else None
        self._writer = SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in numbers(values).items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        for name, value in numbers(values).items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._writer.close()
