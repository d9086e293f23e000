"""TensorBoard event files in `<run>/tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from megatron_lite.observe.numeric import numbers
from megatron_lite.observe.panels import tensorboard_layout


class TensorBoardTracker:
    """Logs scalars by step, and the charts of `panels.PANELS` under Custom Scalars.

    TensorBoard's `purge_step` hides steps of an earlier attempt after `resume_step`, and steps that a rollback undoes.
    """

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        self._folder = str(run_dir / "tensorboard")
        self._begin(resume_step + 1 if resume_step else None)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._add("train", step, values)

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._add(kind, step, values)

    def alert(self, title: str, text: str) -> None:
        """Does nothing: TensorBoard has no alerts."""

    def rewind(self, step: int, rollbacks: int) -> None:
        self._writer.close()
        self._begin(step + 1)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._writer.close()

    def _begin(self, purge_step: int | None) -> None:
        self._writer = SummaryWriter(log_dir=self._folder, purge_step=purge_step)
        self._writer.add_custom_scalars(tensorboard_layout())

    def _add(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        for name, value in numbers(values).items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)
