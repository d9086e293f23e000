"""The gradients of ZeRO-1: one flat tensor for each parameter group, laid out as DeepSpeed's flat weights.

DeepSpeed would keep a tensor for each parameter, flatten them into a second copy of all gradients, all-reduce it, copy
it back, and flatten this rank's partition once more for the update. Here the layers' matrix products write into the
flat tensor (`parallel/gradient_sink.py`), which is reduced in place; the update reads this rank's partition of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup
from torch import Tensor, nn

from megatron_lite.parallel.context import ParallelContext


class FlatGradients:
    """All gradients of this rank. Sums over micro-batches are in fp32 with bf16 weights, else in the weights' dtype."""

    def __init__(
        self, groups: list[list[nn.Parameter]], weights: list[Tensor], flats: list[Tensor], context: ParallelContext
    ) -> None:
        """
        Args:
            groups: parameters of each group.
            weights: the flat tensor that the parameters of each group are views of, padded to a multiple of the number
                of data-parallel ranks.
            flats: for the gradients, of the same layout.
        """
        self._flats = flats
        self._context = context
        self._parameters = [parameter for group in groups for parameter in group]
        for group, of_weights, flat in zip(groups, weights, flats, strict=True):
            for parameter in group:
                start = parameter.storage_offset() - of_weights.storage_offset()
                parameter.gradient_sink.bind(flat.narrow(0, start, parameter.numel()).view_as(parameter))

    def complete(self) -> None:
        """After the last micro-batch: every gradient is in its flat tensor, and `Parameter.grad` is a view of it if the
        dtypes agree."""
        for parameter in self._parameters:
            self.take(parameter)
            parameter.gradient_sink.complete()
            if parameter.gradient_sink.total.dtype is parameter.dtype:
                parameter.grad = parameter.gradient_sink.total

    def take(self, parameter: nn.Parameter) -> None:
        """Move a gradient that autograd has left in `Parameter.grad`."""
        if parameter.grad is not None:
            parameter.gradient_sink.add(parameter.grad)
            parameter.grad = None

    def reduce(self) -> None:
        """Average over the data-parallel ranks: afterwards this rank's partitions are complete, and no other part of a
        gradient may be read. A collective of the data-parallel group."""
        for parameter in self._parameters:
            parameter.grad = None  # it would show what is not reduced
        if self._context.data_group is not None:
            self._average(self._context.data_group)

    def _average(self, group: dist.ProcessGroup) -> None:
        for flat, partition in zip(self._flats, self.partitions, strict=True):
            flat.div_(self._context.data_size)  # before the sum, which could overflow fp16
            if reduces_by_scattering(flat):
                dist.reduce_scatter_tensor(partition, flat, group=group)  # half the bytes of an all-reduce
            else:
                dist.all_reduce(flat, group=group)

    @property
    def partitions(self) -> list[Tensor]:
        """This rank's part of each flat tensor."""
        return [flat.chunk(self._context.data_size)[self._context.data_rank] for flat in self._flats]

    def clear(self) -> None:
        """After the update: the next step starts from nothing."""
        for parameter in self._parameters:
            parameter.gradient_sink.clear()


def reduces_by_scattering(flat: Tensor) -> bool:
    """Whether each rank receives only its partition. gloo's reduce-scatter takes longer than its all-reduce."""
    return flat.is_cuda


class _OfStage1(FlatGradients):
    """For DeepSpeed's optimizer of fp32 and fp16, which looks for the partitions in `averaged_gradients`."""

    def __init__(self, optimizer: Any, context: ParallelContext) -> None:
        weights = optimizer.bit16_groups_flat
        super().__init__(optimizer.bit16_groups, weights, [torch.zeros_like(flat) for flat in weights], context)
        self._optimizer = optimizer

    def reduce(self) -> None:
        super().reduce()
        for index, partition in enumerate(self.partitions):
            owned = self._optimizer.params_in_partition[index]
            fragments = [_fragment(parameter.gradient_sink.total, partition) for parameter in owned]
            self._optimizer.averaged_gradients[index] = GradPartitionBufferGroup(fragments, partition)


class _OfBF16(FlatGradients):
    """For DeepSpeed's optimizer of bf16, which has flat fp32 gradients itself."""

    def __init__(self, optimizer: Any, context: ParallelContext) -> None:
        groups = optimizer.bf16_groups
        super().__init__(groups, optimizer.bf16_groups_flat, optimizer.fp32_groups_gradients_flat, context)
        for parameter in self._parameters:
            parameter._hp_grad = parameter.gradient_sink.total  # where DeepSpeed looks for it
        optimizer._update_hp_grad = lambda lp, group_idx, param_idx, clear_lp_grads: self.take(lp)
        optimizer.clear_hp_grads = lambda: None  # `clear` does it without a pass over them


def flat_gradients_of(optimizer: Any, context: ParallelContext) -> FlatGradients:
    """Take over the gradients of DeepSpeed's ZeRO-1 optimizer."""
    return (_OfBF16 if hasattr(optimizer, "fp32_groups_gradients_flat") else _OfStage1)(optimizer, context)


def _fragment(total: Tensor, partition: Tensor) -> Tensor:
    """The part of a parameter's gradient that lies in this rank's partition of the same flat tensor."""
    flat = total.view(-1)
    begin = max(flat.storage_offset(), partition.storage_offset())
    end = min(flat.storage_offset() + flat.numel(), partition.storage_offset() + partition.numel())
    return flat.narrow(0, begin - flat.storage_offset(), end - begin)
