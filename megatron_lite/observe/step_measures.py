"""All measurements of a training step besides loss and norm, as one list that the engine's collective, metrics.jsonl,
charts and trackers use.

To add one, add an entry here and call `context.auxiliary.measure(name, value)` in the layer or the loss
(docs/extending.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StepMeasure:
    """A scalar that layers or the loss measure in each micro-batch."""

    name: str
    """Name of the figure in metrics.jsonl; in wandb and TensorBoard it is train/NAME."""
    reduction: Literal["mean", "sum", "max"]
    """Over the step's micro-batches and all ranks, see `parallel.auxiliary.Reduction`."""
    title: str
    explanation: str
    unit: str = ""
    setting: str | None = None
    """A dotted key: measured only if this setting is neither 0 nor false. None = always."""


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
