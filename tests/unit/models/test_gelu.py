from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_lite.models import gelu
from megatron_lite.models.gelu import gelu_tanh


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [64, 1 << 16])  # the last chunk is a part; one chunk is larger than x
def test_values_and_gradients_are_as_exact_as_the_type_allows(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gelu, "_CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(0)
    x = (4.0 * torch.randn(5, 7, 11, generator=generator)).to(dtype).requires_grad_()
    grad = torch.randn(x.shape, generator=generator).to(dtype)
    exact = x.detach().double().requires_grad_()
    expected = F.gelu(exact, approximate="tanh")
    expected.backward(grad.double())

    y = gelu_tanh(x)
    y.backward(grad)

    one_rounding = torch.finfo(dtype).eps / 2
    smallest = 1e-6  # fp16 is subnormal below 6e-5
    torch.testing.assert_close(y.double(), expected, rtol=1.01 * one_rounding, atol=smallest)
    assert x.grad is not None
    assert exact.grad is not None
    # Two roundings: of the slope and of the product.
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2.02 * one_rounding, atol=smallest)


def test_large_inputs_stay_finite() -> None:
    x = torch.tensor([-1e4, -20.0, 0.0, 20.0, 1e4], dtype=torch.bfloat16, requires_grad=True)
    y = gelu_tanh(x)
    y.sum().backward()
    assert x.grad is not None
    assert y.tolist() == [0.0, 0.0, 0.0, 20.0, x[-1].item()]
    assert x.grad.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_float32_and_inference_are_torchs_own() -> None:
    x = torch.randn(100, requires_grad=True)
    assert torch.equal(gelu_tanh(x), F.gelu(x, approximate="tanh"))
    half = torch.randn(100).bfloat16()
    assert torch.equal(gelu_tanh(half), F.gelu(half, approximate="tanh"))
