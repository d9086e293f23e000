"""Collectives of the tensor-parallel group, plain and differentiable.

Each differentiable one is the transpose of its partner in the backward pass (arXiv 1909.08053, 2205.05198):
    reduce:          all-reduce     | identity         partial sums -> a replicated activation
    reduce_scatter:  reduce-scatter | all-gather       partial sums -> a slice of the sequence
    sum_gradients:   identity       | all-reduce       a replicated parameter, used on each rank's own part
    first_position:  broadcast      | rank 0 keeps it  position 0 of a slice of the sequence -> a replicated activation

Shapes: b micro-batch, s sequence, h channels, t tensor-parallel size.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lite.parallel.context import ParallelContext


def all_gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[b, s/t, h] on each rank -> [b, s, h] on all."""
    size = group.size()
    batch, local, channels = x.shape
    gathered = x.new_empty(size, batch, local, channels)
    dist.all_gather_into_tensor(gathered.flatten(0, 1), x.contiguous(), group=group)  # gloo wants one leading dimension
    return gathered.transpose(0, 1).reshape(batch, size * local, channels)


def start_reduce_scatter_sequence(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    """[b, s, h], one term of a sum on each rank -> a slice [b, s/t, h] of the sum, once the work is done."""
    size = group.size()
    batch, sequence, channels = x.shape
    by_rank = x.view(batch, size, sequence // size, channels).transpose(0, 1).contiguous()  # [t, b, s/t, h]
    scattered = x.new_empty(by_rank.shape[1:])
    return scattered, dist.reduce_scatter_tensor(scattered, by_rank.flatten(0, 1), group=group, async_op=True)


def reduce_scatter_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[b, s, h], one term of a sum on each rank -> a slice [b, s/t, h] of the sum."""
    scattered, work = start_reduce_scatter_sequence(x, group)
    work.wait()
    return scattered


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return reduce_scatter_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather_sequence(grad, ctx.group), None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        fused = torch.cat([grad.reshape(-1) for grad in grads])  # one message instead of one per parameter
        dist.all_reduce(fused, group=ctx.group)
        parts = fused.split([grad.numel() for grad in grads])
        return None, *(part.view_as(grad) for part, grad in zip(parts, grads, strict=True))


class _FirstPosition(torch.autograd.Function):
    """The gradient arrives complete and alike on all ranks, so the owner of position 0 takes it once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: ParallelContext) -> Tensor:
        ctx.shape, ctx.owner = x.shape, context.tensor_rank == 0
        first = x[:, 0].clone()
        dist.broadcast(first, group=context.tensor_group, group_src=0)
        return first

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad_x = grad.new_zeros(ctx.shape)
        if ctx.owner:
            grad_x[:, 0] = grad
        return grad_x, None


def first_position(x: Tensor, context: ParallelContext) -> Tensor:
    """Position 0 of every sample on all ranks: [b, s, h], or [b, s/t, h] under sequence parallelism -> [b, h]."""
    return _FirstPosition.apply(x, context) if context.sequence_parallel else x[:, 0]


def sum_partial(x: Tensor, context: ParallelContext) -> Tensor:
    """Add up the ranks' terms x [b, s, h] of a row-parallel product: [b, s, h], or [b, s/t, h] under sequence parallel.

    Without sequence parallelism the sum is written into x.
    """
    if context.tensor_group is None:
        return x
    operation = _ReduceScatter if context.sequence_parallel else _Reduce
    return operation.apply(x, context.tensor_group)


def sum_gradients(context: ParallelContext, *parameters: nn.Parameter) -> tuple[Tensor, ...]:
    """Parameters as they are; in the backward pass, partial gradients are summed over the tensor-parallel group.

    Which of them have one, their `ShardSpec.partial_gradient` says. Those of one call share one message. The sum is
    made inside the backward pass, not in a hook, so that every engine and ZeRO stage sees whole gradients.
    """
    is_partial = [_has_partial_gradient(parameter, context) for parameter in parameters]
    if not any(is_partial):
        return parameters
    summed = iter(_SumGradients.apply(context.tensor_group, *itertools.compress(parameters, is_partial)))
    return tuple(next(summed) if partial else one for partial, one in zip(is_partial, parameters, strict=True))


def _has_partial_gradient(parameter: nn.Parameter, context: ParallelContext) -> bool:
    computed_from = parameter.shard_spec.partial_gradient
    if computed_from == "sequence":
        return context.sequence_parallel
    return computed_from == "heads" and context.tensor_group is not None
