"""What each optimizer remembers of a parameter, and how that is cut up where the parameter is."""

from __future__ import annotations

from megatron_lite.config.schema import OptimizerConfig, OptimizerName


def moments_of(config: OptimizerConfig) -> tuple[str, ...]:
    """The names of an optimizer's tensors in `state`; a parameter has all of them, under Adafactor some."""
    if config.name is OptimizerName.adamw:
        return ("exp_avg", "exp_avg_sq")
    if config.name is OptimizerName.sgd:
        return ("momentum_buffer",) if config.momentum else ()
    return ("row", "column", "square")


def kept_dims(moment: str, dims: int) -> tuple[int, ...] | None:
    """Which of a parameter's dimensions a moment has; None = it has no such moment.

    Adafactor keeps a matrix's row means (without the last dimension) and column means (without the last but one), and
    all of a vector's squares.
    """
    every = tuple(range(dims))
    if moment == "row":
        return every[:-1] if dims >= 2 else None
    if moment == "column":
        return (*every[:-2], dims - 1) if dims >= 2 else None
    if moment == "square":
        return every if dims < 2 else None
    return every
