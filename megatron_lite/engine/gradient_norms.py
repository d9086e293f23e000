"""The gradient norm, per-layer gradient norms and update ratios, and the loss of each sequence.

The gradient is read once per step, each element on one rank, and a single all-reduce sums everything that depends on
it: the norm that is used for clipping, the norms of the layers, and the loss that spike detection uses. Nothing here
waits for the device.
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

STEPS_BEFORE = 4  # earlier steps whose norms are kept for spike reports
ROW = 512  # elements whose squares are summed together, see `sum_of_squares`
LAYER = re.compile(r"(?:(?:encoder|decoder)\.)?layers\.\d+")


@dataclass(frozen=True)
class LayerFigures:
    """Figures of every layer of the whole model, in model order; each parameter is counted once."""

    grad_norm: Mapping[str, float]  # before clipping
    update_ratio: Mapping[str, float]  # norm of the update / norm of the weight


class LayerMeter:
    """Measures gradients and updates by layer. The constructor is a collective of all ranks, as are the methods that
    say so.

    Args:
        shards: this rank's optimizer shards. Each element of the model is owned by exactly one rank, so that tied and
            replicated parameters are counted once.
    """

    def __init__(self, shards: Shards, context: ParallelContext) -> None:
        self._shards, self._context = shards, context
        stages: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        own_stage = [layer_of(parameter.global_name) for parameter in shards.module.parameters()]
        dist.all_gather_object(stages, own_stage)  # in rank order, which is the order of stages
        self.layers: list[str] = list(dict.fromkeys(name for stage in stages for name in stage))
        rows = [self.layers.index(layer_of(parameter.global_name)) for parameter, _ in shards.owned]
        self._rows = torch.tensor(rows, dtype=torch.long, device=context.device)
        self._squares: deque[Tensor] = deque(maxlen=STEPS_BEFORE + 2)  # [layers] each: sums over the whole model
        self._before: list[Tensor] = []
        self._update: Tensor | None = None  # [2, layers]: squares of update and of weight, this rank's share

    def measure_gradient(self, loss: Tensor, loss_scale: float) -> tuple[Tensor, Tensor]:
        """Call between the last gradient reduction of a step and clipping. A collective of all ranks.

        Args:
            loss: scalar, this rank's share of the loss.

        Returns:
            Scalars, equal on every rank: the loss, and the norm of the whole model's gradient without the loss scale.
        """
        squares = self._squares_of(self._shards.owned_gradients()) / loss_scale**2
        sums = self._summed(torch.cat([torch.stack([loss.double(), squares.sum()]), self._by_layer(squares)]))
        self._squares.append(sums[2:])
        return sums[0], sums[1].sqrt().float()

    def before_update(self) -> None:
        """Copy the weights before the update; only in steps for which update ratios are needed."""
        self._before = [weight.clone() for weight in self._shards.owned_weights()]

    def after_update(self) -> None:
        if self._before:
            weights = self._shards.owned_weights()
            updates = [before.sub_(weight) for before, weight in zip(self._before, weights, strict=True)]
            self._update = torch.stack([self._by_layer(self._squares_of(tensors)) for tensors in (updates, weights)])
            self._before = []

    def figures(self) -> LayerFigures:
        """The figures of the last step. A collective of all ranks."""
        gradient = self._named(self._squares[-1])
        if self._update is None:
            return LayerFigures(gradient, {})
        update, weight = map(self._named, self._summed(self._update))
        self._update = None
        return LayerFigures(gradient, {layer: update[layer] / of if of else 0.0 for layer, of in weight.items()})

    def recent_grad_norms(self, step: int, newer: int = 0) -> dict[int, dict[str, float]]:
        """Gradient norms of this step and the STEPS_BEFORE before it: step -> layer -> norm.

        Args:
            newer: how many steps after this one have been measured: 0 or 1.
        """
        last = len(self._squares) - newer
        first = max(last - STEPS_BEFORE - 1, 0)
        recent = list(self._squares)[first:last]
        return {step - len(recent) + 1 + place: self._named(squares) for place, squares in enumerate(recent)}

    def forget(self) -> None:
        """Forget all steps so far; for a rollback, after which their numbers come again."""
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
    """[elements] -> fp32 scalar, with a relative error of at most 1e-6.

    On a CPU torch's norm adds up squares one by one, so with a million elements small terms are rounded away: an error
    of 1e-5 or more. Rows of 512 are too short for that, and `sum` adds their results pairwise. fp64 would take twice
    the time.
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
    """Peak memory (of the GPU, or of the process on a CPU) of each stage's fullest rank. A collective of all ranks."""
    if context.device.type == "cuda":
        own = torch.cuda.max_memory_allocated(context.device)
    else:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    stages = torch.zeros(context.pipeline_size, dtype=torch.float64, device=context.device)
    stages[context.pipeline_rank] = own
    dist.all_reduce(stages, op=dist.ReduceOp.MAX)
    return [int(most) for most in stages.tolist()]


def sequence_losses(sequences: Sequence[Tensor], context: ParallelContext, global_batch_size: int) -> list[float]:
    """Nats per token of each sequence of the global batch, in sample order. A collective of all ranks.

    Args:
        sequences: `TokenLoss.sequences` of the step; used only on the last stage.
    """
    both = torch.zeros(2, global_batch_size, device=context.device)
    if context.is_last_stage and context.tensor_rank == 0 and sequences:
        own = torch.cat(list(sequences), dim=1)
        first = context.data_rank * own.shape[1]  # every rank fills its own columns, so the sum is a gather
        both[:, first : first + own.shape[1]] = own
    dist.all_reduce(both)
    losses, weights = both.tolist()
    return [loss / weight if weight else 0.0 for loss, weight in zip(losses, weights, strict=True)]
