"""How a parameter is split over the tensor-parallel group, and how its slices are joined again.

Each parameter carries a `ShardSpec`. Initialisation, checkpoints and the import of other models' weights all speak of
full tensors under global names ("layers.3.mlp.down.weight"), which no layout changes; only this file cuts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.rng import stable_hash

PartialGradient: TypeAlias = Literal["sequence", "heads"]


@dataclass(frozen=True)
class Init:
    """The distribution that a parameter starts from."""

    kind: Literal["normal", "zeros", "ones"]
    std: float = 0.0
    row_scales: tuple[tuple[int, float], ...] = ()
    """(rows, factor) in turn, over and over along the first dimension: matrices with different deviations that are
    fused into one parameter. Empty = no factor."""

    @classmethod
    def normal(cls, std: float, row_scales: tuple[tuple[int, float], ...] = ()) -> Init:
        return cls("normal", std, row_scales)

    @classmethod
    def zeros(cls) -> Init:
        return cls("zeros")

    @classmethod
    def ones(cls) -> Init:
        return cls("ones")


@dataclass(frozen=True)
class ShardSpec:
    """The full tensor behind a parameter."""

    full_shape: tuple[int, ...]
    """Of the true tensor, without padding."""
    dim: int | None
    """The dimension that is split evenly over the tensor-parallel group; None = every rank holds all of it."""
    init: Init
    padded_size: int | None = None
    """Size of `dim` after padding with zeros (vocabulary); None = no padding."""
    partial_gradient: PartialGradient | None = None
    """What each rank of the tensor-parallel group computes this replicated parameter's gradient from: its slice of the
    sequence (under sequence parallelism), or its own attention heads (always). The whole gradient is then the sum over
    the group, which `collectives.sum_gradients` makes. None = every rank computes the whole gradient."""

    def __post_init__(self) -> None:
        if self.partial_gradient is not None and self.dim is not None:
            raise ValueError("a parameter that is split over the tensor-parallel group has no partial gradient")

    def local_shape(self, tensor_size: int) -> tuple[int, ...]:
        """Shape of one rank's slice."""
        if self.dim is None:
            return self.full_shape
        shape = list(self.full_shape)
        size, remainder = divmod(self.padded_size or shape[self.dim], tensor_size)
        if remainder:
            raise ValueError(f"dimension {self.dim} of {self.full_shape} is not a multiple of {tensor_size} ranks")
        shape[self.dim] = size
        return tuple(shape)


def sharded_parameter(spec: ShardSpec, context: ParallelContext) -> nn.Parameter:
    """An uninitialised parameter of the local shape, marked with its spec."""
    parameter = nn.Parameter(torch.empty(spec.local_shape(context.tensor_size), device=context.device))
    mark(parameter, spec)
    return parameter


def mark(parameter: nn.Parameter, spec: ShardSpec) -> None:
    """Attach the spec, and to split parameters the attribute that DeepSpeed's gradient norms look for."""
    parameter.shard_spec = spec
    if spec.dim is not None:
        parameter.tensor_model_parallel = True  # a gradient norm without it counts the shard of one rank alone


def take_slice(full: Tensor, spec: ShardSpec, tensor_rank: int, tensor_size: int) -> Tensor:
    """The part of `full` (unpadded, of spec.full_shape) that one rank holds; rows of padding are zeros."""
    if tuple(full.shape) != spec.full_shape:
        raise ValueError(f"expected a tensor of shape {spec.full_shape}, got {tuple(full.shape)}")
    if spec.dim is None:
        return full
    shape = spec.local_shape(tensor_size)
    size = shape[spec.dim]
    start = min(tensor_rank * size, full.shape[spec.dim])
    part = full.narrow(spec.dim, start, min(size, full.shape[spec.dim] - start))
    if part.shape[spec.dim] == size:
        return part
    padded = full.new_zeros(shape)
    padded.narrow(spec.dim, 0, part.shape[spec.dim]).copy_(part)
    return padded


def join_slices(slices: list[Tensor], spec: ShardSpec) -> Tensor:
    """The full, unpadded tensor out of the slices of all tensor-parallel ranks, in rank order."""
    if spec.dim is None:
        return slices[0]
    return torch.cat(slices, spec.dim).narrow(spec.dim, 0, spec.full_shape[spec.dim])


def set_global_names(module: nn.Module, prefix: str) -> None:
    """Give each parameter the name that it has in every layout: prefix + its name inside the module."""
    for name, parameter in module.named_parameters():
        parameter.global_name = f"{prefix}.{name}"


@torch.no_grad()
def initialise(module: nn.Module, prefix: str, seed: int, context: ParallelContext) -> None:
    """Draw every parameter of `module` as a function of its global name and the seed alone.

    The full tensor is drawn in fp32 on the CPU and then cut, so that the layout and the device change nothing.
    """
    for name, parameter in module.named_parameters():
        spec = parameter.shard_spec
        full = _draw(spec, stable_hash(seed, "init", f"{prefix}.{name}"))
        parameter.copy_(take_slice(full, spec, context.tensor_rank, context.tensor_size))


def _draw(spec: ShardSpec, seed: int) -> Tensor:
    if spec.init.kind == "zeros":
        return torch.zeros(spec.full_shape)
    if spec.init.kind == "ones":
        return torch.ones(spec.full_shape)
    generator = torch.Generator().manual_seed(seed)
    full = torch.empty(spec.full_shape).normal_(0.0, spec.init.std, generator=generator)
    if spec.init.row_scales:
        pattern = torch.cat([torch.full((rows,), factor) for rows, factor in spec.init.row_scales])
        full.unflatten(0, (-1, len(pattern))).mul_(pattern.view(-1, *[1] * (full.dim() - 1)))
    return full
