"""The tanh approximation of GELU, with our own kernel for half precision on CPUs, where torch's takes 6 % of a step."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = 1 << 16
"""Four fp32 buffers of 256 KB: about the second-level cache of a core. CPU-ms of forward and backward over 1.6 M bf16
elements, one Zen 4 thread: 6.4 in torch; here 8.3, 6.5, 5.2 and 4.6 with chunks of 2^13, 2^14, 2^15 and 2^16."""

_A = 2.0 * math.sqrt(2.0 / math.pi)
_B = 0.044715 * _A


def gelu_tanh(x: Tensor) -> Tensor:
    """x (1 + tanh(u / 2)) / 2 with u = x (_A + _B x^2), of any shape (arXiv 1606.08415)."""
    own_is_faster = x.device.type == "cpu" and x.dtype is not torch.float32 and x.requires_grad
    if own_is_faster and not torch.compiler.is_compiling():
        return _GeluTanh.apply(x)
    return F.gelu(x, approximate="tanh")


class _GeluTanh(torch.autograd.Function):
    """(1 + tanh(u / 2)) / 2 is s = sigmoid(u), whose kernel costs a sixth of tanh's.

    With y = x s, the slope dy/dx is s (1 + (x - y) (_A + 3 _B x^2)). It is computed while x is in the cache and saved
    instead of x, in x's dtype, so that the backward pass is one product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, slope = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
        buffers = torch.empty(4, min(_CHUNK_ELEMENTS, x.numel()))
        chunks = (tensor.view(-1).split(_CHUNK_ELEMENTS) for tensor in (x.contiguous(), y, slope))
        for x_part, y_part, slope_part in zip(*chunks, strict=True):
            _value_and_slope(x_part, y_part, slope_part, buffers[:, : x_part.numel()])
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return grad * slope


def _value_and_slope(x: Tensor, y: Tensor, slope: Tensor, buffers: Tensor) -> None:
    """x [n] -> y and slope [n], using fp32 buffers [4, n]."""
    exact, square, sigmoid, value = buffers
    exact.copy_(x)
    torch.mul(exact, exact, out=square)
    torch.add(torch.tensor(_A), square, alpha=_B, out=sigmoid).mul_(exact).sigmoid_()
    y.copy_(torch.mul(exact, sigmoid, out=value))
    rise = torch.add(torch.tensor(_A), square, alpha=3.0 * _B, out=square)
    slope.copy_(torch.addcmul(torch.tensor(1.0), rise, exact.sub_(value), out=value).mul_(sigmoid))
