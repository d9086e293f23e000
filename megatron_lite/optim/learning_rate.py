"""The learning rate as a pure function of the step, so that a resume needs no scheduler state."""

from __future__ import annotations

from megatron_lite.config.schema import OptimizerConfig


def learning_rate_at(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """The learning rate of one update.

    In the warm-up it is `learning_rate * step / warmup_steps` (arXiv 1706.02677), so the last step of the warm-up runs
    at the peak. Then it follows the curve of `config.decay` (config/decays.py), which starts at the peak. A decay
    with an end reaches min_learning_rate at `decay_steps`, or at `total_steps` if that is None, and stays there.

    Args:
        step: number of the update, counted from 1.
        total_steps: updates of the whole run.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    decay = config.decay.form
    end = config.decay_steps if config.decay_steps is not None else total_steps
    if decay.has_end and step >= end:
        return config.min_learning_rate
    return decay.curve(step, end, config)
