"""How a parameter is split over the tensor-parallel group, and how its slices are joined again.

Each parameter has a `ShardSpec`. Initialisation, checkpoints and the import of other models' weights all work with full
tensors under global names ("layers.3.mlp.down.weight") that are the same in every layout; only this file slices them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.gradient_sink import GradientSink
from megatron_lite.parallel.rng import stable_hash

PartialGradient: TypeAlias = Literal["sequence", "heads"]


@dataclass(frozen=True)
class Init:
    """The distribution that a parameter is initialised from."""

    kind: Literal["normal", "zeros", "ones"]
    std: float = 0.0
    row_scales: tuple[tuple[int, float], ...] = ()
    """A pattern of (rows, factor) that repeats along the first dimension and multiplies the initial values: for several
    matrices with different standard deviations that are fused into one parameter. Empty = no factor."""

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
    """Without padding."""
    dim: int | None
    """The dimension that is split evenly over the tensor-parallel group; None = replicated on every rank."""
    init: Init
    padded_size: int | None = None
    """Size of `dim` after padding with zeros (vocabulary); None = no padding."""
    partial_gradient: PartialGradient | None = None
    """For a replicated parameter: what each tensor-parallel rank computes its gradient from, its slice of the sequence
    (under sequence parallelism) or its own attention heads (always). The complete gradient is the sum over the group,
    see `collectives.sum_gradients`. None = every rank computes the complete gradient."""

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
    """An uninitialised parameter of the local shape, with its spec attached."""
    parameter = nn.Parameter(torch.empty(spec.local_shape(context.tensor_size), device=context.device))
    mark(parameter, spec)
    return parameter


def mark(parameter: nn.Parameter, spec: ShardSpec) -> None:
    """Attach the spec and a gradient sink; split parameters also get the attribute that DeepSpeed's gradient norm looks
    for."""
    parameter.shard_spec = spec
    parameter.gradient_sink = GradientSink()
    if spec.dim is not None:
        parameter.tensor_model_parallel = True  # otherwise the gradient norm counts only the shard of one rank


def take_slice(full: Tensor, spec: ShardSpec, tensor_rank: int, tensor_size: int) -> Tensor:
    """The slice of `full` (unpadded, of shape spec.full_shape) that one rank holds; padding rows are zeros."""
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
    """Join the slices of all tensor-parallel ranks, in rank order, into the full tensor without padding."""
    if spec.dim is None:
        return slices[0]
    return torch.cat(slices, spec.dim).narrow(spec.dim, 0, spec.full_shape[spec.dim])


def set_global_names(module: nn.Module, prefix: str) -> None:
    """Give each parameter its global name, the same in every layout: prefix + its name inside the module."""
    for name, parameter in module.named_parameters():
        parameter.global_name = f"{prefix}.{name}"


@torch.no_grad()
def initialise(module: nn.Module, prefix: str, seed: int, context: ParallelContext) -> None:
    """Initialise every parameter of `module` as a function of only its global name and the seed.

    Each rank draws the full tensor in fp32 on the CPU and keeps its slice, so initial weights are bit-identical in
    every layout and on every device.
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
