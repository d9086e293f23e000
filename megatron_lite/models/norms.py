"""LayerNorm and RMSNorm over the last dimension.

Shapes: b micro-batch, s sequence, t tensor-parallel size, h hidden. Under sequence parallelism x is [b, s/t, h].
A norm of queries or keys, where each tensor rank has its own heads, takes `partial_gradient="heads"`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.config.schema import Normalization
from megatron_lite.parallel.collectives import sum_gradients
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.sharding import Init, PartialGradient, ShardSpec, sharded_parameter


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * weight + bias; statistics in fp32 (arXiv 1607.06450)."""

    def __init__(
        self, size: int, epsilon: float, context: ParallelContext, partial_gradient: PartialGradient = "sequence"
    ) -> None:
        super().__init__()
        self.context = context
        self.epsilon = epsilon
        self.weight = sharded_parameter(_vector(size, Init.ones(), partial_gradient), context)
        self.bias = sharded_parameter(_vector(size, Init.zeros(), partial_gradient), context)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = sum_gradients(self.context, self.weight, self.bias)
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.epsilon)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight; statistics in fp32 (arXiv 1910.07467)."""

    def __init__(
        self, size: int, epsilon: float, context: ParallelContext, partial_gradient: PartialGradient = "sequence"
    ) -> None:
        super().__init__()
        self.context = context
        self.epsilon = epsilon
        self.weight = sharded_parameter(_vector(size, Init.ones(), partial_gradient), context)

    def forward(self, x: Tensor) -> Tensor:
        (weight,) = sum_gradients(self.context, self.weight)
        if x.is_cuda or torch.compiler.is_compiling():
            return F.rms_norm(x, x.shape[-1:], weight, self.epsilon)
        return _RMSNorm.apply(x, weight, self.epsilon)


class _RMSNorm(torch.autograd.Function):
    """For CPUs, where F.rms_norm is a chain of small operations with a backward pass twice as slow.

    With r = 1 / sqrt(mean(x^2) + epsilon) and y = x r w, the gradient of x is r w dy - x r^3 mean(x w dy).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        exact = x.float()
        mean_square = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(epsilon).rsqrt_()  # [b, s, 1]
        ctx.save_for_backward(x, weight, scale)
        return (exact * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        rows, grad_rows = (tensor.reshape(-1, tensor.shape[-1]).float() for tensor in (x, grad))  # [b s, h]
        exact_weight, scale = weight.float(), scale.view(-1)
        product = rows * grad_rows
        grad_weight = product.t() @ scale
        pull = (product @ exact_weight) * scale**3 / rows.shape[-1]  # [b s]
        grad_x = (grad_rows * exact_weight).mul_(scale[:, None]).addcmul_(rows, pull[:, None], value=-1)
        return grad_x.to(x.dtype).view_as(x), grad_weight.to(weight.dtype), None


def _vector(size: int, init: Init, partial_gradient: PartialGradient) -> ShardSpec:
    return ShardSpec((size,), None, init, partial_gradient=partial_gradient)


def build_norm(model: ResolvedModel, context: ParallelContext) -> nn.Module:
    """The norm that `model.normalization` selects."""
    norm = RMSNorm if model.normalization is Normalization.rmsnorm else LayerNorm
    return norm(model.hidden_size, model.norm_epsilon, context)
