"""Gather full tensors, by global name, from sliced weights and gradients."""

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
    """This stage's tensors, whole, unpadded, in fp32 on the CPU, by global name.

    Args:
        fetch: a parameter's tensor-parallel slice of the wanted quantity (weight, gradient), joined over data ranks.
    A collective over the data and tensor groups; every rank of a stage gets the same result.
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
    """By global name, how far the tensor-parallel ranks' copies of what is not split differ at most, relatively.

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
