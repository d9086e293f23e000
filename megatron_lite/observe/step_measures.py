"""What a step can measure besides loss and norm, as one list: the engine's collective, metrics.jsonl, charts and
trackers are made of it.

To add one: an entry here, and in the layer or the loss `context.auxiliary.measure(name, value)` (docs/extending.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StepMeasure:
    """A scalar that layers or the loss measure in each micro-batch."""

    name: str
    """Of the figure in metrics.jsonl; wandb and TensorBoard have it as train/NAME."""
    reduction: Literal["mean", "sum", "max"]
    """Over the step's micro-batches and all ranks, see `parallel.auxiliary.Reduction`."""
    title: str
    explanation: str
    unit: str = ""
    setting: str | None = None
    """It is measured where this setting is neither 0 nor false; None = always."""


STEP_MEASURES = (
    StepMeasure(
        "z_loss",
        "mean",
        "z-loss",
        "optimizer.z_loss_weight x mean of log(Z)^2 over the tokens, Z being the softmax's denominator: if it "
        "grows, the logits drift.",
        unit="nats per token",
        setting="optimizer.z_loss_weight",
    ),
)
