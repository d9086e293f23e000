"""What a step did to each layer, and what each sequence cost: measured on every rank, added up when somebody asks.

Measuring costs one pass over the gradient and no wait for the device. Adding up is one all-reduce; where nobody wants
the figures of a step there is none.
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

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train.shards import Shards

STEPS_BEFORE = 4  # whose figures are still there when a step turns out to be a spike
LAYER = re.compile(r"(?:(?:encoder|decoder)\.)?layers\.\d+")


@dataclass(frozen=True)
class LayerFigures:
    """Of the whole model, each parameter counted once; by layer, in the model's order."""

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
        self._squares: deque[Tensor] = deque(maxlen=STEPS_BEFORE + 1)  # [layers] each, of this rank
        self._before: list[Tensor] = []
        self._update: Tensor | None = None  # [2, layers]: squares of update and of weight

    def measure_gradient(self, loss_scale: float) -> None:
        """Between the last reduction of a step and clipping."""
        self._squares.append(self._by_layer(self._shards.owned_gradients()) / loss_scale**2)

    def before_update(self) -> None:
        """Keep the weights that the update is measured against; only in steps for which `figures` are wanted."""
        self._before = [weight.clone() for weight in self._shards.owned_weights()]

    def after_update(self) -> None:
        if self._before:
            weights = self._shards.owned_weights()
            updates = [before.sub_(weight) for before, weight in zip(self._before, weights, strict=True)]
            self._update = torch.stack([self._by_layer(updates), self._by_layer(weights)])
            self._before = []

    def squares(self) -> Tensor:
        """[layers]: this rank's part of the squared gradient norms of the newest step."""
        return self._squares[-1]

    def figures(self) -> LayerFigures:
        """Of the newest step. A collective of all ranks."""
        update = torch.zeros(2, len(self.layers), device=self._context.device)
        if self._update is not None:
            update, self._update = self._update, None
        gradient, update, weight = self._summed(torch.cat([self.squares()[None], update])).sqrt().tolist()
        ratios = [0.0 if not of else up / of for up, of in zip(update, weight, strict=True)]
        return LayerFigures(self._named(gradient), self._named(ratios) if any(weight) else {})

    def recent_grad_norms(self, step: int) -> dict[int, dict[str, float]]:
        """Step -> layer -> norm, of the newest steps. A collective of all ranks.

        Args:
            step: the newest one that was measured.
        """
        summed = self._summed(torch.stack(list(self._squares))).sqrt().tolist()
        first = step - len(summed) + 1
        return {first + place: self._named(norms) for place, norms in enumerate(summed)}

    def forget(self) -> None:
        """The steps so far: the run goes back."""
        self._squares.clear()
        self._update = None

    def _named(self, values: Sequence[float]) -> dict[str, float]:
        return dict(zip(self.layers, values, strict=True))

    def _by_layer(self, tensors: Sequence[Tensor]) -> Tensor:
        """[layers]: sums of squares, in fp32 as DeepSpeed's own norm is."""
        sums = torch.zeros(len(self.layers), device=self._context.device)
        if tensors:
            norms = torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float32))
            sums.index_add_(0, self._rows, norms.to(sums.device).square())
        return sums

    def _summed(self, parts: Tensor) -> Tensor:
        dist.all_reduce(parts)
        return parts


def layer_of(name: str) -> str:
    """The layer that a parameter counts to: `layers.3.mlp.up.weight` -> `layers.3`, `head_bias.bias` -> `head_bias`."""
    found = LAYER.match(name)
    return found[0] if found else name.rpartition(".")[0]


def stage_memory_bytes(context: ParallelContext) -> list[int]:
    """Of each stage, what its fullest rank has used at most, of a GPU or as a process. A collective of all ranks."""
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
