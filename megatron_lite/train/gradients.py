"""Whole-model views of gradients that lie in slices: their norm, and the full tensors by global name."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.sharding import join_slices


def counts_once(parameter: nn.Parameter, context: ParallelContext) -> bool:
    """True on exactly one tensor-parallel rank and stage for every element of the model.

    A replicated parameter counts on tensor rank 0, a tied one on the first stage that holds it (DeepSpeed marks the
    other copies with `ds_pipe_replicated`), a sharded one everywhere.
    """
    if getattr(parameter, "ds_pipe_replicated", False):
        return False
    return parameter.shard_spec.dim is not None or context.tensor_rank == 0


def clip_by_global_norm(parameters: Iterable[nn.Parameter], largest: float, context: ParallelContext) -> float:
    """Scale `.grad` in place so that the norm of the whole model's gradient is at most `largest` (0 = no limit).

    For ZeRO-0, whose gradients lie whole on every data-parallel rank. A collective over tensor and pipeline groups.

    Returns:
        the norm before clipping
    """
    gradients = [(p, p.grad) for p in parameters if p.grad is not None]
    square = torch.zeros((), dtype=torch.float32, device=context.device)
    for parameter, gradient in gradients:
        if counts_once(parameter, context):
            square += gradient.float().pow(2).sum()
    for group in (context.tensor_group, context.pipeline_group):
        if group is not None:
            dist.all_reduce(square, group=group)
    norm = float(square.sqrt())
    if 0 < largest < norm:
        for _, gradient in gradients:
            gradient.mul_(largest / (norm + 1e-6))  # the epsilon of torch.nn.utils.clip_grad_norm_
    return norm


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
