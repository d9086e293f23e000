"""Blocks as graphs of torch.compile (`train.compile=blocks`): one graph for each kind of block, without a break.

All blocks of a kind share one graph, so that its compilation costs the same for any number of layers. What differs
between layers and micro-batches enters as tensors: weights, activations, the dropout key.

Only training runs compiled: evaluation and generation are rare, and their shapes and modes would need graphs of
their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_lite.errors import TrainingError, remedy_of
from megatron_lite.models.block import TransformerBlock
from megatron_lite.models.masks import Visibility
from megatron_lite.models.positions import Angles
from megatron_lite.parallel.rng import DropoutKey

BACKEND = "inductor"


def run_compiled(
    block: TransformerBlock,
    x: Tensor,
    visibility: Visibility,
    memory: Tensor | None,
    key: DropoutKey | None,
    angles: Angles | None,
) -> Tensor:
    """What block(...) returns, through its graph in a training step."""
    if not (block.training and torch.is_grad_enabled()):
        return block(x, visibility, memory, key, angles)
    packed = None if key is None else key.packed()
    try:
        return _graph(BACKEND)(block, x, visibility, memory, packed, angles)
    except Exception as error:
        _require_compiled(block, error)
        raise


def _require_compiled(block: TransformerBlock, error: Exception) -> None:
    """
    Raises:
        TrainingError: the error is of the compiler, not of the block's arithmetic.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # imports the whole compiler

    if isinstance(error, TorchDynamoException | FailOnRecompileLimitHit):
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        remedy = remedy_of(error, "set train.compile=none")
        raise TrainingError(
            f"train.compile=blocks: torch.compile makes no graph of {block.name}: {said}; {remedy}"
        ) from error


@functools.cache
def _graph(backend: str) -> Callable[..., Tensor]:
    return torch.compile(_call, backend=backend, fullgraph=True, dynamic=False)


def _call(block: TransformerBlock, *arguments: Any) -> Any:
    return block(*arguments)
