"""Relative position buckets and their bias against transformers' T5."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

from megatron_lite.config.derived import resolve_model
from megatron_lite.models.initial import stack_init
from megatron_lite.models.relative import RelativeBias, relative_buckets
from megatron_lite.parallel.context import ParallelContext
from tests.tiny_models import T5


@pytest.mark.parametrize("both_directions", [False, True])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 12), (16, 20), (64, 1000)])
def test_buckets_are_those_of_t5(both_directions: bool, num_buckets: int, max_distance: int):
    distances = torch.arange(-3000, 3001)
    ours = relative_buckets(
        distances, both_directions=both_directions, num_buckets=num_buckets, max_distance=max_distance
    )
    theirs = T5Attention._relative_position_bucket(
        distances, bidirectional=both_directions, num_buckets=num_buckets, max_distance=max_distance
    )
    assert torch.equal(ours, theirs)
    assert len(ours.unique()) == num_buckets - both_directions  # the first for keys behind would be at distance 0


def _bias(causal: bool, dtype: torch.dtype = torch.float32) -> RelativeBias:
    model = resolve_model(replace(T5, relative_buckets=16, relative_max_distance=20))
    bias = RelativeBias(model, ParallelContext.single(), stack_init(model, 2), causal=causal)
    torch.nn.init.normal_(bias.weight, generator=torch.Generator().manual_seed(0))
    return bias.to(dtype)


def _written_out(weight: Tensor, length: int, causal: bool) -> Tensor:
    """[1, n, s, s] entry by entry; a causal stack sees no key behind the query."""
    positions = torch.arange(length)
    buckets = T5Attention._relative_position_bucket(
        positions[None] - positions[:, None], bidirectional=not causal, num_buckets=16, max_distance=20
    )
    bias = F.embedding(buckets, weight).permute(2, 0, 1)[None]
    return bias.masked_fill(positions > positions[:, None], -torch.inf) if causal else bias


@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize("causal", [False, True])
def test_the_bias_and_its_gradient_are_those_of_an_embedding(causal: bool, length: int):
    bias = _bias(causal)
    exact = bias.weight.detach().double().requires_grad_()
    out, expected = bias(length), _written_out(exact, length, causal)
    assert out.shape == (1, 4, length, length)
    assert torch.equal(out.double(), expected)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(bias.weight.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_padding_is_seen_in_no_encoder():
    lengths = torch.tensor([6, 2, 1])
    whole, padded = _bias(causal=False)(6), _bias(causal=False)(6, lengths)
    assert padded.shape == (3, 4, 6, 6)
    for sample, length in enumerate(lengths.tolist()):
        assert torch.equal(padded[sample, ..., :length], whole[0, ..., :length])
        assert (padded[sample, ..., length:] == -torch.inf).all()
    causal = _bias(causal=True)
    assert torch.equal(causal(6, lengths), causal(6)), "there it lies behind everything that counts"


def test_in_bf16_the_gradient_is_summed_in_fp32():
    bias = _bias(causal=False, dtype=torch.bfloat16)
    exact = bias.weight.detach().double().requires_grad_()
    upstream = torch.rand(1, 4, 400, 400, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = bias(400)
    assert out.dtype is torch.bfloat16
    out.backward(upstream)
    _written_out(exact, 400, causal=False).backward(upstream.double())
    torch.testing.assert_close(bias.weight.grad.double(), exact.grad, rtol=2**-8, atol=0.0)  # one rounding
