"""The gradient norm, per-layer gradient norms and update ratios, and the loss of each sequence.

The gradient is read once a step, each element on one rank, and one all-reduce adds up all that is wanted of it: the
norm that every optimizer clips by, the norms of the layers, the loss that a step is judged by. No wait for the device.
"""

from __future__ import annotations

import re
import resource
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.engine.shards import Shards
from megatron_lite.parallel.context import ParallelContext

STEPS_BEFORE = 4  # earlier steps whose figures are kept for the report of a spike
ROW = 512  # elements
LAYER = re.compile(r"(?:(?:encoder|decoder)\.)?layers\.\d+")


@dataclass(frozen=True)
class LayerFigures:
    """Figures of each layer of the whole model, in the model's order; each parameter is counted once."""

    grad_norm: Mapping[str, float]  # before clipping
    update_ratio: Mapping[str, float]  # norm of the update / norm of the weight


class LayerMeter:
    """Built on every rank, by a collective of all of them; so is each method that says so.

    Args:
        shards: what this rank holds. Each element of the model is owned by one rank.
    """

    def __init__(self, shards: Shards, context: ParallelContext) -> None:
        self._shards, self._context = shards, context
        stages: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        own_stage = [layer_of(parameter.global_name) for parameter in shards.module.parameters()]
        dist.all_gather_object(stages, own_stage)  # ranks are numbered by stages
        self.layers: list[str] = list(dict.fromkeys(name for stage in stages for name in stage))
        rows = [self.layers.index(layer_of(parameter.global_name)) for parameter, _ in shards.owned]
        self._rows = torch.tensor(rows, dtype=torch.long, device=context.device)
        self._squares: deque[Tensor] = deque(maxlen=STEPS_BEFORE + 1)  # [layers] each, of the whole model
        self._before: list[Tensor] = []
        self._update: Tensor | None = None  # [2, layers]: squares of update and of weight, of this rank

    def measure_gradient(self, loss: Tensor, loss_scale: float) -> tuple[Tensor, Tensor]:
        """Between the last reduction of a step and clipping. A collective of all ranks.

        Args:
            loss: scalar, this rank's part of the loss.

        Returns:
            Scalars, the same on every rank: the loss, and the norm of the whole model's gradient, not scaled.
        """
        squares = self._squares_of(self._shards.owned_gradients()) / loss_scale**2
        sums = self._summed(torch.cat([torch.stack([loss.double(), squares.sum()]), self._by_layer(squares)]))
        self._squares.append(sums[2:])
        return sums[0], sums[1].sqrt().float()

    def before_update(self) -> None:
        """Copy the weights before the update; only in steps for which `figures` are needed."""
        self._before = [weight.clone() for weight in self._shards.owned_weights()]

    def after_update(self) -> None:
        if self._before:
            weights = self._shards.owned_weights()
            updates = [before.sub_(weight) for before, weight in zip(self._before, weights, strict=True)]
            self._update = torch.stack([self._by_layer(self._squares_of(tensors)) for tensors in (updates, weights)])
            self._before = []

    def figures(self) -> LayerFigures:
        """The figures of the newest step. A collective of all ranks."""
        gradient = self._named(self._squares[-1])
        if self._update is None:
            return LayerFigures(gradient, {})
        update, weight = map(self._named, self._summed(self._update))
        self._update = None
        return LayerFigures(gradient, {layer: update[layer] / of if of else 0.0 for layer, of in weight.items()})

    def recent_grad_norms(self, step: int) -> dict[int, dict[str, float]]:
        """Step -> layer -> norm, of the newest steps.

        Args:
            step: the newest one that was measured.
        """
        first = step - len(self._squares) + 1
        return {first + place: self._named(squares) for place, squares in enumerate(self._squares)}

    def forget(self) -> None:
        """Forget the steps so far: the run is rolled back."""
        self._squares.clear()
        self._update = None

    def _named(self, squares: Tensor) -> dict[str, float]:
        return dict(zip(self.layers, squares.sqrt().tolist(), strict=True))

    def _squares_of(self, tensors: Sequence[Tensor]) -> Tensor:
        """[tensors], fp64: each one's sum of squares."""
        if not tensors:
            return torch.zeros(0, dtype=torch.float64, device=self._context.device)
        if tensors[0].is_cuda:
            squares = torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float32)).square()
        else:
            squares = torch.stack([sum_of_squares(tensor) for tensor in tensors])
        return squares.to(self._context.device, torch.float64)

    def _by_layer(self, squares: Tensor) -> Tensor:
        """[tensors] -> [layers]"""
        sums = torch.zeros(len(self.layers), dtype=squares.dtype, device=squares.device)
        return sums.index_add_(0, self._rows, squares)

    def _summed(self, parts: Tensor) -> Tensor:
        dist.all_reduce(parts)
        return parts


def sum_of_squares(tensor: Tensor) -> Tensor:
    """[elements] -> fp32 scalar, off by 1e-6 at most.

    A CPU adds up the squares of a norm one after the other, so that of a million elements the small ones are lost: off
    by 1e-5 and more. Short rows lose nothing, and it adds up their sums in pairs. In fp64 it would take twice the time.
    """
    whole = tensor.numel() // ROW * ROW
    rows = torch.linalg.vector_norm(tensor[:whole].view(-1, ROW), dim=1, dtype=torch.float32)
    rest = torch.linalg.vector_norm(tensor[whole:], dtype=torch.float32)
    return rows.square().sum() + rest.square()


def layer_of(name: str) -> str:
    """The layer of a parameter: `layers.3.mlp.up.weight` -> `layers.3`, `head_bias.bias` -> `head_bias`."""
    found = LAYER.match(name)
    return found[0] if found else name.rpartition(".")[0]


def stage_memory_bytes(context: ParallelContext) -> list[int]:
    """Peak memory (GPU, or process on a CPU) of the fullest rank of each stage. A collective of all ranks."""
    if context.device.type == "cuda":
        own = torch.cuda.max_memory_allocated(context.device)
    else:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stages = torch.zeros(context.pipeline_size, dtype=torch.float64, device=context.device)
    stages[context.pipeline_rank] = own
    dist.all_reduce(stages, op=dist.ReduceOp.MAX)
    return [int(most) for most in stages.tolist()]


def sequence_losses(sequences: Sequence[Tensor], context: ParallelContext, global_batch_size: int) -> list[float]:
    """Nats per token of each sequence of the global batch, in the order of its samples. A collective of all ranks.

    Args:
        sequences: `TokenLoss.sequences` of the step, where this rank is on the last stage.
    """
    both = torch.zeros(2, global_batch_size, device=context.device)
    if context.is_last_stage and context.tensor_rank == 0 and sequences:
        own = torch.cat(list(sequences), dim=1)
        first = context.data_rank * own.shape[1]
        both[:, first : first + own.shape[1]] = own
    dist.all_reduce(both)
    losses, weights = both.tolist()
    return [loss / weight if weight else 0.0 for loss, weight in zip(losses, weights, strict=True)]
