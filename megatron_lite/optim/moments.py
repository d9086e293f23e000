"""The state tensors of each optimizer, and how they are sharded along with their parameter."""

from __future__ import annotations

from megatron_lite.config.schema import OptimizerConfig, OptimizerName


def moments_of(config: OptimizerConfig) -> tuple[str, ...]:
    """The names of an optimizer's tensors in `state`. A parameter has all of them, under Adafactor some."""
    if config.name is OptimizerName.adamw:
        return ("exp_avg", "exp_avg_sq")
    if config.name is OptimizerName.sgd:
        return ("momentum_buffer",) if config.momentum else ()
    return ("row", "column", "square")


def kept_dims(moment: str, dims: int) -> tuple[int, ...] | None:
    """Which of a parameter's dimensions a moment has; None = the parameter has no such moment.

    For a matrix, Adafactor keeps row means (without the last dimension) and column means (without the last but one);
    for a vector, all squares.
    """
    every = tuple(range(dims))
    if moment == "row":
        return every[:-1] if dims >= 2 else None
    if moment == "column":
        return (*every[:-2], dims - 1) if dims >= 2 else None
    if moment == "square":
        return every if dims < 2 else None
    return every
