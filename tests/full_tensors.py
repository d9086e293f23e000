"""Weights of sharded models as full tensors, in both directions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from megatron_lite.engine.engine import Engine
from megatron_lite.engine.full_tensors import full_tensors
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.sharding import take_slice


@torch.no_grad()
def load_full_tensors(module: nn.Module, tensors: Mapping[str, Tensor], context: ParallelContext) -> None:
    """Set every parameter of `module` to its slice of the full tensor of its global name."""
    for parameter in module.parameters():
        full = tensors[parameter.global_name]
        parameter.copy_(take_slice(full, parameter.shard_spec, context.tensor_rank, context.tensor_size))


def full_weights(engine: Engine) -> dict[str, Tensor]:
    """This stage's fp32 weights by global name. A collective of the stage."""
    return full_tensors(engine.module, engine.context, _weight)


def _weight(parameter: nn.Parameter) -> Tensor:
    weight = safe_get_full_fp32_param(parameter)
    return parameter if weight is None else weight  # ZeRO-0 keeps the weight itself in fp32
