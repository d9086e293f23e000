"""Collectives of the tensor-parallel group, plain and differentiable.

The backward pass of each differentiable one is the transpose of its forward pass (arXiv 1909.08053, 2205.05198):
    (name)           forward        | backward         use
    reduce:          all-reduce     | identity         partial sums -> a replicated activation
    reduce_scatter:  reduce-scatter | all-gather       partial sums -> a slice of the sequence
    sum_gradients:   identity       | all-reduce       a replicated parameter, used on each rank's own part
    first_position:  broadcast      | rank 0 keeps it  position 0 of a slice of the sequence -> a replicated activation

In a block that torch.compile traces, the same sums are torch's functional collectives, which belong to the graph.

Shapes: b micro-batch, s sequence, h channels, t tensor-parallel size.
"""

from __future__ import annotations

import itertools
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.graph_ops import start_all_gather_after

Started: TypeAlias = tuple[Tensor, dist.Work | None]
"""A collective under way: `finished` waits for it and returns its result. In a traced block there is no `Work`."""

_graph = torch.ops._c10d_functional


def finished(started: Started) -> Tensor:
    result, work = started
    if torch.compiler.is_compiling():
        return _graph.wait_tensor(result)
    if work is not None:
        work.wait()
    return result


def start_all_reduce(x: Tensor, group: dist.ProcessGroup) -> Started:
    """Sum x over the ranks; outside of a traced block in place."""
    if torch.compiler.is_compiling():
        return _graph.all_reduce(x, "sum", group.group_name), None
    return x, dist.all_reduce(x, group=group, async_op=True)


def start_all_gather_sequence(x: Tensor, group: dist.ProcessGroup, after: Tensor | None = None) -> Started:
    """[b, s/t, h] on each rank -> [t b, s/t, h] on all, for `gathered_sequence`.

    Args:
        after: a traced block must not gather before this tensor is there. Without it, the compiler would gather x for
            the backward pass in the forward pass, and keep the result.
    """
    size, x = group.size(), x.contiguous()
    if torch.compiler.is_compiling():
        if after is not None:
            return start_all_gather_after(x, after, size, group.group_name), None
        return _graph.all_gather_into_tensor(x, size, group.group_name), None
    gathered = x.new_empty(size * x.shape[0], *x.shape[1:])
    return gathered, dist.all_gather_into_tensor(gathered, x, group=group, async_op=True)


def gathered_sequence(started: Started, group: dist.ProcessGroup) -> Tensor:
    """Wait for `start_all_gather_sequence`: [b, s, h]."""
    by_rank = finished(started).unflatten(0, (group.size(), -1))  # [t, b, s/t, h]
    return by_rank.transpose(0, 1).flatten(1, 2)


def all_gather_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[b, s/t, h] on each rank -> [b, s, h] on all."""
    return gathered_sequence(start_all_gather_sequence(x, group), group)


def start_reduce_scatter_sequence(x: Tensor, group: dist.ProcessGroup) -> Started:
    """[b, s, h], one term of a sum on each rank -> a slice [b, s/t, h] of the sum."""
    size = group.size()
    by_rank = x.unflatten(1, (size, -1)).transpose(0, 1).contiguous().flatten(0, 1)  # [t b, s/t, h]
    if torch.compiler.is_compiling():
        return _graph.reduce_scatter_tensor(by_rank, "sum", size, group.group_name), None
    scattered = x.new_empty(x.shape[0], *by_rank.shape[1:])
    return scattered, dist.reduce_scatter_tensor(scattered, by_rank, group=group, async_op=True)


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        if not torch.compiler.is_compiling():
            ctx.mark_dirty(x)  # summed in place: saves an activation-sized buffer
        return finished(start_all_reduce(x, group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return finished(start_reduce_scatter_sequence(x, group))

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
        parts = finished(start_all_reduce(fused, ctx.group)).split([grad.numel() for grad in grads])
        return None, *(part.view_as(grad) for part, grad in zip(parts, grads, strict=True))


class _FirstPosition(torch.autograd.Function):
    """The gradient is already complete and equal on all ranks, so only the owner of position 0 uses it, once."""

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
    """Sum the ranks' partial outputs x [b, s, h] of a row-parallel layer: [b, s, h], or [b, s/t, h] under sequence
    parallelism.

    Without sequence parallelism x is overwritten with the sum, except in a traced block.
    """
    if context.tensor_group is None:
        return x
    operation = _ReduceScatter if context.sequence_parallel else _Reduce
    return operation.apply(x, context.tensor_group)


def sum_gradients(context: ParallelContext, *parameters: nn.Parameter) -> tuple[Tensor, ...]:
    """Return the parameters unchanged; their partial gradients are summed over the tensor-parallel group in backward.

    `ShardSpec.partial_gradient` says which parameters have a partial gradient. One call needs one all-reduce. It runs
    inside autograd, not in a gradient hook: ZeRO installs hooks of its own, and every stage of it has to see complete
    gradients.
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
