"""Settings for detecting loss spikes and reacting to them. A part of `schema.RunConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from megatron_lite.config import ranges
from megatron_lite.config.setting import SAFE, setting


class OnSpike(StrEnum):
    warn = "warn"  # report it and train on
    skip_step = "skip_step"  # report it and skip that step's update
    rollback = "rollback"  # return to the checkpoint before it, and skip the samples that led to it


@dataclass
class StabilityConfig:
    """The usual level is the median and the median absolute deviation of the latest steps without spikes: unlike mean
    and standard deviation, they hardly change if a spike is among these steps."""

    on_spike: OnSpike = setting(OnSpike.warn, resume=SAFE)
    """Reaction to a spike."""
    window: int = setting(128, range=ranges.MEDIAN_WINDOW, resume=SAFE)
    """Number of latest steps without spikes that are used: as many as in OLMo-core."""
    min_steps: int = setting(16, range=ranges.MEDIAN_WINDOW, resume=SAFE)
    """Steps without spikes before loss and gradient norm are judged; NaN and Inf are spikes from the first step on."""
    loss_deviations: float = setting(8.0, range=ranges.DEVIATIONS, resume=SAFE)
    """A loss is a spike if it is this many robust deviations (1.4826 x the median absolute one) above the median ..."""
    min_loss_rise: float = setting(0.05, range=ranges.LOSS_RISE, resume=SAFE)
    """... and at least this fraction of the median above it: late in a run losses hardly differ, and even a small
    fluctuation would be many deviations."""
    grad_norm_deviations: float = setting(10.0, range=ranges.DEVIATIONS, resume=SAFE)
    """The same for the logarithm of the gradient norm, which is skewed; in two steps in a row, or in one whose loss
    rises by half its own limit. Single steps with fifty times the usual norm are common in small batches, and harmless
    with gradient clipping ..."""
    min_grad_norm_factor: float = setting(10.0, range=ranges.NORM_FACTOR, resume=SAFE)
    """... and at least this many times the median."""
    loss_scale_halvings: int = setting(6, range=ranges.HALVINGS, resume=SAFE)
    """fp16: this many halvings of the loss scale within `window` steps count as a collapse of the loss scale."""
    lead_in_steps: int = setting(1, range=ranges.STEPS_OR_0, resume=SAFE)
    """rollback: steps before the spike whose samples are skipped too: the update before it may have caused it."""
    look_ahead_steps: int = setting(32, range=ranges.STEPS_OR_0, resume=SAFE)
    """rollback: largest number of steps whose samples are tested with the restored weights, to find the last sample to
    skip."""
    max_rollbacks: int = setting(4, range=ranges.ROLLBACKS, resume=SAFE)
    """Maximum per run; if a spike returns at the place that was skipped, each further rollback skips twice as many more
    samples. If another one would be needed, the run ends as diverged."""
    layer_interval: int = setting(20, range=ranges.STEPS_OR_0, resume=SAFE)
    """Steps between figures of each layer (gradient norm, update-to-weight ratio) and of memory; 0 = only at spikes."""
    worst_sequences: int = setting(4, range=ranges.SHOWN_SEQUENCES, resume=SAFE)
    """Number of sequences with the highest loss whose text a spike report shows."""

    def measures_layers(self, step: int) -> bool:
        """Whether each layer is measured in this step, counted from 1."""
        return self.layer_interval > 0 and step % self.layer_interval == 0
