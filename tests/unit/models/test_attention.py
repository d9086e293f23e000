"""Attention over short sequences on a CPU against torch's own, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.config.derived import resolve_model
from megatron_lite.config.schema import ModelConfig
from megatron_lite.models import attention
from megatron_lite.models.attention import Attention, short_causal_attention
from megatron_lite.models.initial import stack_init
from megatron_lite.parallel.context import ParallelContext

TOLERANCE = 1e-6  # norm of the difference, relative to the norm
LENGTHS = [2, 5, 128, 129, 300]  # below, at and beyond one block of queries, and with a remainder


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _inputs(length: int, groups: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """query [2, 4, s, 16], key and value [2, g, s, 16], and the output's gradient [2, 4, s, 16]."""
    generator = torch.Generator().manual_seed(length)
    return tuple(
        torch.randn(2, length, heads, 16, generator=generator).to(dtype).transpose(1, 2)
        for heads in (4, groups, groups, 4)
    )


def _run(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Output and the three gradients."""
    *leaves, grad = (part.detach().to(dtype).requires_grad_() for part in inputs)
    out = function(*leaves)
    out.backward(grad.detach())
    assert out.dtype == dtype
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def _errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_equals_sdpa_in_fp32(length: int, groups: int):
    inputs = _inputs(length, groups, torch.float32)
    exact = _run(_sdpa, inputs, torch.float64)
    assert max(_errors(_run(short_causal_attention, inputs, torch.float32), exact)) < TOLERANCE


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_equals_sdpa_in_fp64(length: int, groups: int):
    """Double stays double: fp32 in between would show."""
    inputs = _inputs(length, groups, torch.float64)
    exact = _run(_sdpa, inputs, torch.float64)
    assert max(_errors(_run(short_causal_attention, inputs, torch.float64), exact)) < 1e-13


@pytest.mark.parametrize("length", [128, 300])
def test_is_no_less_exact_than_sdpa_in_bf16(length: int):
    inputs = _inputs(length, 4, torch.bfloat16)
    exact = _run(_sdpa, inputs, torch.float64)
    own, torchs = (
        _errors(_run(function, inputs, torch.bfloat16), exact) for function in (short_causal_attention, _sdpa)
    )
    assert all(a <= b for a, b in zip(own, torchs, strict=True)), (own, torchs)


def test_long_sequences_take_sdpa(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    monkeypatch.setattr(attention, "_LONGEST_SHORT_SEQUENCE", 8)
    monkeypatch.setattr(attention, "short_causal_attention", lambda q, k, v: calls.append("short") or _sdpa(q, k, v))
    model = resolve_model(ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=8))
    init = stack_init(model, 1)
    layer = Attention(model, ParallelContext.single(), init, causal=True, recompute=False)
    layer(torch.ones(1, 8, 16), None)
    assert calls == ["short"]
    layer(torch.ones(1, 9, 16), None)
    assert calls == ["short"]
