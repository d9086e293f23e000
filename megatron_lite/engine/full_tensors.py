"""Gather full tensors, by global name, from tensor-parallel slices of weights or gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.sharding import join_slices


def full_tensors(
    module: nn.Module, context: ParallelContext, fetch: Callable[[nn.Parameter], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """This stage's full tensors by global name: without padding, in fp32 on the CPU.

    A collective over the data and tensor groups; every rank of a stage gets the same result.

    Args:
        fetch: returns a parameter's tensor-parallel slice of the wanted quantity (weight, gradient), already gathered
            over data-parallel ranks.
    """
    gathered: dict[str, torch.Tensor] = {}
    for parameter in module.parameters():
        local = fetch(parameter).detach().float().contiguous()
        if parameter.shard_spec.dim is not None and context.tensor_group is not None:
            slices = [torch.empty_like(local) for _ in range(context.tensor_size)]
            dist.all_gather(slices, local, group=context.tensor_group)
        else:
            slices = [local]
        gathered[parameter.global_name] = join_slices(slices, parameter.shard_spec).cpu().clone()
    return gathered


def replica_differences(
    module: nn.Module, context: ParallelContext, fetch: Callable[[nn.Parameter], torch.Tensor]
) -> dict[str, float]:
    """By global name of each replicated parameter, the largest relative difference between tensor-parallel ranks.

    A collective over the data and tensor groups.
    """
    found: dict[str, float] = {}
    if context.tensor_group is None:
        return found
    for parameter in module.parameters():
        own = fetch(parameter).detach().float().contiguous()
        if parameter.shard_spec.dim is None:
            first = own.clone()
            dist.broadcast(first, group=context.tensor_group, group_src=0)
            difference = (own - first).norm() / first.norm().clamp(min=1e-30)
            dist.all_reduce(difference, op=dist.ReduceOp.MAX, group=context.tensor_group)
            found[parameter.global_name] = float(difference)
    return found
