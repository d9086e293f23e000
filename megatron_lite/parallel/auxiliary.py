"""Side outputs of layers and of the loss in a training step: auxiliary losses and measurements.

Neither is sent between pipeline stages. An auxiliary loss takes effect in the backward pass: an autograd function
returns its input unchanged and passes a gradient to the loss, as in Megatron's mixture-of-experts layers. A measurement
stays on its rank until one collective after the step's last backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

Reduction: TypeAlias = Literal["mean", "sum", "max"]
"""How values are reduced over micro-batches and ranks. `mean`: sum of all values / (micro-batches x data-parallel
ranks), as for the loss."""


class AuxiliaryChannel:
    """Auxiliary losses and measurements of one rank. Layers reach it through their `ParallelContext`."""

    def __init__(self, tensor_rank: int, world_size: int, device: torch.device) -> None:
        self._is_first_of_tensor_ranks = tensor_rank == 0
        self._world_size = world_size
        self._device = device
        self.gradient = 1.0
        """What the backward pass of one micro-batch starts with at its loss."""
        self._gradient = torch.ones((), device=device)  # the same; compiled blocks do not depend on a tensor's value
        self._is_recording = True
        self._sums: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}

    def begin_step(self, gradient: float) -> None:
        """
        Args:
            gradient: the gradient that the backward pass of one micro-batch starts with at its loss:
                fp16's loss scale / number of micro-batches.
        """
        self.gradient = gradient
        self._gradient = torch.full((), gradient, device=self._device)
        self._sums.clear()
        self._largest.clear()

    def record(self, is_forward: bool) -> None:
        """Turn recording on for a forward pass and off otherwise: recomputation runs the same code a second time."""
        self._is_recording = is_forward

    def add_loss(self, x: Tensor, name: str, loss: Tensor, *, on_slices: bool = False) -> Tensor:
        """Return x unchanged; its backward pass also backpropagates `loss`, which is recorded as a measurement too.

        Args:
            x: any activation of this layer that the training loss depends on.
            loss: scalar fp32 of this micro-batch, already weighted. Its mean over micro-batches and data-parallel ranks
                is the global batch's (loss weights are scaled for that, see `engine.loss_weights`).
            on_slices: under sequence parallelism `loss` covers only this rank's slice; False = each tensor-parallel
                rank computes all of it.
        """
        self.measure(name, loss, on_slices=on_slices)
        return _AddLoss.apply(x, loss, self._gradient) if torch.is_grad_enabled() else x

    def measure(self, name: str, value: Tensor, *, on_slices: bool = False) -> None:
        """Record a scalar of this micro-batch; `observe.step_measures` defines how the values of a step are reduced."""
        if not self._is_recording or not torch.is_grad_enabled():
            return
        value = value.detach().float()
        self._largest[name] = torch.maximum(self._largest[name], value) if name in self._largest else value.clone()
        if on_slices or self._is_first_of_tensor_ranks:  # a value that all tensor-parallel ranks have is added once
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()

    def collect(self, measures: Mapping[str, Reduction], count: int) -> dict[str, float]:
        """The reduced measurements of the step, equal on every rank; see `gather` and `reduced_measures`. Waits for the
        device."""
        return reduced_measures(measures, count, self.gather(measures).tolist())

    def gather(self, measures: Mapping[str, Reduction]) -> Tensor:
        """What all ranks have recorded in the step, on the device. A collective of all ranks.

        Args:
            measures: names and reductions of this run's measurements, in the same order on every rank: a stage that
                does not measure one still has to take part in the collective.
        Returns:
            [2 x measures] fp64: the sums, then the largest values.
        Raises:
            KeyError: a measurement was recorded under a name that is not in `measures`.
        """
        if unknown := self._largest.keys() - measures.keys():
            raise KeyError(
                f"{', '.join(sorted(unknown))} was measured but is not listed; add it to STEP_MEASURES in "
                "megatron_lite/observe/step_measures.py"
            )
        if not measures:
            return torch.zeros(0, dtype=torch.float64, device=self._device)
        own = torch.stack([self._own(name, kind) for name, kind in measures.items()])  # [measures]
        ranks = own.new_empty(self._world_size, len(own))
        if self._world_size > 1:
            # Gathered, not reduced: sums and maxima then share one message. gloo accepts only one dimension here.
            dist.all_gather_into_tensor(ranks.view(-1), own)
        else:
            ranks[0] = own
        return torch.cat([ranks.double().sum(0), ranks.amax(0).double()])

    def _own(self, name: str, kind: Reduction) -> Tensor:
        values, missing = (self._largest, -torch.inf) if kind == "max" else (self._sums, 0.0)
        return values[name] if name in values else torch.full((), missing, device=self._device)


def reduced_measures(measures: Mapping[str, Reduction], count: int, gathered: Sequence[float]) -> dict[str, float]:
    """The measurements of a step by name.

    Args:
        count: micro-batches of the global batch, over all data-parallel ranks.
        gathered: what `AuxiliaryChannel.gather` returned.
    """
    divisors = {"mean": count, "sum": 1}
    sums, largest = gathered[: len(measures)], gathered[len(measures) :]
    return {
        name: most if kind == "max" else total / divisors[kind]
        for (name, kind), total, most in zip(measures.items(), sums, largest, strict=True)
    }


class _AddLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad, gradient.clone(), None
