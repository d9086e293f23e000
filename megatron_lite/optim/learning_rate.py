"""The learning rate as a pure function of the step, so that a resume needs no scheduler state."""

from __future__ import annotations

import math

from megatron_lite.config.schema import Decay, OptimizerConfig


def learning_rate_at(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of one update.

    With peak `a`, floor `m`, warm-up `w` and end `T` (`decay_steps`, or `total_steps` when that is None):

    - step <= w: `a * step / w` (arXiv 1706.02677), so the last step of the warm-up runs at the peak;
    - linear: `m + (a - m) * (1 - f)`, cosine: `m + (a - m) * (1 + cos(pi f)) / 2` (arXiv 1608.03983 without restarts;
      GPT-3, arXiv 2005.14165), with `f = (step - w) / (T - w)`; `m` from step T on;
    - inverse_sqrt: `max(m, a * sqrt(w / step))`, the 1/sqrt(max(step, w)) of T5 (arXiv 1910.10683, section 3.1.2)
      scaled to start from the peak; it needs no end, so T plays no part;
    - constant: `a`.

    Every decay equals the peak at step w: there is no jump at the end of the warm-up.

    Args:
        step: number of the update, counted from 1.
        total_steps: updates of the whole run.
    """
    peak, floor, warmup = config.learning_rate, config.min_learning_rate, config.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if config.decay is Decay.constant:
        return peak
    if config.decay is Decay.inverse_sqrt:
        return max(floor, peak * math.sqrt(max(warmup, 1) / step))

    end = config.decay_steps if config.decay_steps is not None else total_steps
    if step >= end:
        return floor
    fraction = (step - warmup) / (end - warmup)
    if config.decay is Decay.linear:
        return floor + (peak - floor) * (1.0 - fraction)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * fraction))
