"""Bytes of model states on one rank: weights, gradients, optimizer. For activations see `activations`.

Follows ZeRO, arXiv 1910.02054, section 3.1, with what the engine really keeps: bf16 gradients are summed in fp32, and
every ZeRO stage holds an fp32 copy of its share of the weights, even in fp32 runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import Compile, OptimizerName, Precision

FLOAT = 4
HALF = 2


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one rank."""

    weights: float
    gradients: float
    """In bf16 under ZeRO-1 their sum in fp32; beside it those of the last backward pass, in bf16, if matrix products do
    not add to the sum themselves: with offload, and in compiled blocks."""
    optimizer: float
    """Master weights and moments; in host memory with parallel.offload_optimizer."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer

    def on_device(self, config: ResolvedConfig) -> float:
        """Without what parallel.offload_optimizer keeps in host memory."""
        return self.total - (self.optimizer if config.parallel.offload_optimizer else 0.0)


def model_states(config: ResolvedConfig, parameters: int, data_parallel_size: int) -> ModelStates:
    """Bytes of the states of `parameters` local parameters, shared over the data-parallel ranks by the ZeRO stage."""
    stage, precision = config.parallel.zero_stage, config.train.precision
    share = parameters / data_parallel_size
    weight_bytes = FLOAT if precision is Precision.fp32 else HALF
    gradient_bytes = HALF if precision is Precision.fp16 else FLOAT
    adds_in_place = stage == 1 and not config.parallel.offload_optimizer and config.train.compile is Compile.none
    if precision is Precision.bf16 and stage <= 1 and not adds_in_place:
        gradient_bytes += HALF
    master_bytes = FLOAT if stage else 0
    return ModelStates(
        weights=weight_bytes * (share if stage >= 3 else parameters),
        gradients=gradient_bytes * (share if stage >= 2 else parameters),
        optimizer=(master_bytes + _moment_bytes(config)) * (share if stage >= 1 else parameters),
    )


def _moment_bytes(config: ResolvedConfig) -> int:
    """Bytes per parameter. Adafactor keeps only a row and a column per matrix, which is negligible."""
    optimizer = config.optimizer
    if optimizer.name is OptimizerName.adamw:
        return 2 * FLOAT
    return FLOAT if optimizer.name is OptimizerName.sgd and optimizer.momentum else 0
