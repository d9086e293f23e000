"""Settings of what counts as a spike, and of what is done about one. A part of `schema.RunConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class OnSpike(StrEnum):
    warn = "warn"  # report it and train on
    skip_step = "skip_step"  # report it and drop that step's update
    rollback = "rollback"  # back to the checkpoint before it, and past the samples that led in


@dataclass
class StabilityConfig:
    """What is usual is measured by the median and the median absolute deviation of the latest usual steps: a spike
    among them moves neither, but would move a mean and widen a standard deviation."""

    on_spike: OnSpike = OnSpike.warn
    """What is done about a spike."""
    window: int = 128
    """Latest usual steps that are looked at: as many as in OLMo-core."""
    min_steps: int = 16
    """Usual steps before loss and gradient norm are judged; NaN and Inf are spikes from the first step on."""
    loss_deviations: float = 8.0
    """A loss is a spike that lies so many robust deviations (1.4826 x the median absolute one) above the median ..."""
    min_loss_rise: float = 0.05
    """... and at least this fraction of the median: late in a run losses hardly differ, and the smallest bump would be
    many deviations."""
    grad_norm_deviations: float = 10.0
    """The same of the logarithm of the gradient norm, which is skewed; in two steps in a row, or in one whose loss
    rises by half its own limit. Single steps of fifty times the usual norm are common in small batches, and harmless
    where they are clipped ..."""
    min_grad_norm_factor: float = 10.0
    """... and at least so many times the median."""
    loss_scale_halvings: int = 6
    """fp16: so many halvings of the loss scale within `window` steps are its collapse."""
    lead_in_steps: int = 1
    """rollback: steps before the spike whose samples are left out too: the update before it may have caused it."""
    look_ahead_steps: int = 32
    """rollback: steps at most whose samples are tried, with the weights gone back to, to find where those end that
    are to be left out."""
    max_rollbacks: int = 4
    """Of a run; should a spike come back at the place that was jumped over, each further one leaves out twice as many
    samples more. Where another one would be needed, the run ends as diverged."""
    layer_interval: int = 20
    """Steps between figures of each layer (gradient norm, update-to-weight ratio) and of memory; 0 = only at spikes."""
    worst_sequences: int = 4
    """Sequences of the highest loss whose text a spike report shows."""

    def measures_layers(self, step: int) -> bool:
        """Whether the figures of each layer are wanted for this step; it counts from 1."""
        return self.layer_interval > 0 and step % self.layer_interval == 0
