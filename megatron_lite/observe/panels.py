"""The charts of a run as one list, used by report.html, the wandb workspace and TensorBoard's Custom Scalars.

Keys are names of figures as the trackers log them: `train/loss` is `loss` in metrics.jsonl, `evaluation/...` is a field
of events of that kind, and `train/layer_grad_norm/*` means every entry of a nested figure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from megatron_lite.observe.step_measures import STEP_MEASURES

WHOLE_GROUP = "/*"


@dataclass(frozen=True)
class Panel:
    """One chart over steps."""

    title: str
    section: str
    keys: tuple[str, ...]
    explanation: str
    """One line for readers who are not familiar with the chart."""
    unit: str = ""
    factor: float = 1.0
    """The figure x factor is in `unit`; only report.html applies it."""
    log_axis: bool = False
    stacked: bool = False
    """The keys are parts of a whole."""
    reference: str | None = None
    """A key that is drawn as a dashed line over the others, for comparison."""
    points: bool = False
    """Draw each event as a point instead of a curve."""
    branches: bool = False
    """Show rolled-back steps, spikes and resumes."""

    @property
    def all_keys(self) -> tuple[str, ...]:
        return self.keys if self.reference is None else (*self.keys, self.reference)


PANELS = (
    Panel(
        "Loss",
        "Learning",
        ("train/loss", "evaluation/validation_loss"),
        "Training loss of every step, and validation loss; spikes are marked, rolled-back steps are grey.",
        unit="nats per token",
        branches=True,
    ),
    Panel(
        "Gradient norm",
        "Learning",
        ("train/grad_norm",),
        "L2 norm of the whole gradient before clipping; a jump here often comes one step before a jump in the loss.",
        log_axis=True,
        branches=True,
    ),
    *(
        Panel(measure.title, "Learning", (f"train/{measure.name}",), measure.explanation, unit=measure.unit)
        for measure in STEP_MEASURES
    ),
    Panel(
        "Learning rate",
        "Learning",
        ("train/learning_rate",),
        "The learning rate of each update.",
    ),
    Panel(
        "Loss scale",
        "Learning",
        ("train/loss_scale",),
        "fp16's factor on the loss: it halves when gradients overflow; 1 in other precisions.",
        log_axis=True,
    ),
    Panel(
        "Gradient norm by layer",
        "Layers",
        ("train/layer_grad_norm/*",),
        "L2 norm of each layer's gradient: which layer a spike begins in, and whether gradients vanish with depth.",
        log_axis=True,
    ),
    Panel(
        "Update-to-weight ratio by layer",
        "Layers",
        ("train/layer_update_ratio/*",),
        "Norm of a step's update over the norm of the weights; about 1e-3 is usual, much more says the learning rate "
        "is too high for that layer.",
        log_axis=True,
    ),
    Panel(
        "Speed",
        "Speed",
        ("train/tokens_per_second",),
        "Tokens per second of all ranks together, including waits for data.",
        unit="tokens/s",
    ),
    Panel(
        "Model FLOPs utilisation",
        "Speed",
        ("train/model_flops_utilization",),
        "FLOPs per token x tokens/s / peak FLOP/s of all devices; recomputation does not count.",
        unit="%",
        factor=100.0,
    ),
    Panel(
        "Where a step's time goes",
        "Speed",
        tuple(f"train/share_{part}" for part in ("pipeline", "compute", "reduce", "optimizer", "data")),
        "Shares of a step on rank 0. Pipeline is the wait for other stages; the part below the dashed line is the "
        "pipeline bubble of the schedule.",
        unit="% of a step",
        factor=100.0,
        stacked=True,
        reference="train/ideal_bubble",
    ),
    Panel(
        "Memory by stage",
        "Speed",
        ("train/stage_memory_bytes/*",),
        "Peak memory of the fullest rank of each pipeline stage.",
        unit="GiB",
        factor=2.0**-30,
    ),
    Panel(
        "Batch size",
        "Data",
        ("train/global_batch_size",),
        "Sequences in a step, over all ranks.",
        unit="sequences",
    ),
    Panel(
        "Skipped samples",
        "Data",
        ("rollback/first_sample", "rollback/stop_sample"),
        "First sample that each rollback left out, and the first sample after them that was trained on again.",
        unit="global sample number",
        points=True,
    ),
    Panel(
        "Restarts",
        "Data",
        ("start/world_size", "resume/world_size"),
        "The steps at which attempts started, and their numbers of ranks.",
        unit="ranks",
        points=True,
    ),
)


def pattern(key: str) -> str:
    """A regular expression that matches the figures of a key, but no longer names that start with it."""
    if key.endswith(WHOLE_GROUP):
        return f"^{re.escape(key.removesuffix(WHOLE_GROUP))}/.+$"
    return f"^{re.escape(key)}$"


def sections() -> dict[str, list[Panel]]:
    """The panels of each section, in the order of the list."""
    found: dict[str, list[Panel]] = {}
    for panel in PANELS:
        found.setdefault(panel.section, []).append(panel)
    return found


def tensorboard_layout() -> dict[str, dict[str, list[Any]]]:
    """The argument of `SummaryWriter.add_custom_scalars`: section -> title -> kind of chart and patterns of tags."""
    return {
        section: {panel.title: ["Multiline", [pattern(key) for key in panel.all_keys]] for panel in panels}
        for section, panels in sections().items()
    }
