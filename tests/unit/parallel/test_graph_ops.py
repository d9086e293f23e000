"""Operators of compiled blocks: the masks, attention and gradients that eager dropout has with the same key."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.models.dropout import activation_dropout, inner_dropout
from megatron_lite.models.masks import masked_attention
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.rng import DropoutKey

KEY = DropoutKey("decoder.layers.3", 2**40 + 7)


def _single(tensor_rank: int = 0) -> ParallelContext:
    context = ParallelContext.single(seed=11)
    context.rng.tensor_rank = tensor_rank
    return context


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), max_size=120))
def test_a_key_can_be_packed(first_sample: int, name: str) -> None:
    key = DropoutKey(name, first_sample)
    assert key.packed().shape == KEY.packed().shape
    assert DropoutKey.unpacked(key.packed()) == key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_those_of_eager_dropout(dtype: torch.dtype) -> None:
    x, context = torch.randn(2, 9, 33, dtype=dtype), _single()
    for dropped in (
        lambda key: activation_dropout(x, 0.3, key, "mlp_output", context),
        lambda key: inner_dropout(x, 0.3, key, context),
    ):
        eager, traced = dropped(KEY), dropped(KEY.packed())
        assert torch.equal(eager == 0, traced == 0)
        torch.testing.assert_close(traced, eager)
        other = dropped(KEY._replace(first_sample=1).packed())
        assert not torch.equal(traced == 0, other == 0)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("mask", ["none", "causal", "lengths", "bias"])
def test_attention_with_dropout_has_the_eager_result_and_gradients(mask: str, groups: int) -> None:
    query = torch.randn(2, 4, 6, 8, requires_grad=True)
    key_heads, value = (torch.randn(2, groups, 6, 8, requires_grad=True) for _ in range(2))
    bias = torch.randn(1, 4, 6, 6, requires_grad=True)
    given = {"lengths": torch.arange(6)[None, None, None] < torch.tensor([4, 6])[:, None, None, None], "bias": bias}
    inputs = [query, key_heads, value, *([bias] if mask == "bias" else [])]

    def results(key: DropoutKey | torch.Tensor, tensor_rank: int = 0) -> list[torch.Tensor]:
        out = masked_attention(
            query, key_heads, value, given.get(mask), causal=mask == "causal", scale=0.5, dropout=0.4, key=key,
            context=_single(tensor_rank), site="attention",
        )  # fmt: skip
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        return [out, *torch.autograd.grad((out * weights).sum(), inputs)]

    for rank in (0, 1):
        for eager, traced in zip(results(KEY, rank), results(KEY.packed(), rank), strict=True):
            torch.testing.assert_close(traced, eager)
    assert not torch.equal(results(KEY.packed(), 0)[0], results(KEY.packed(), 1)[0])


def test_the_operators_leave_the_generator_as_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    activation_dropout(torch.ones(8), 0.5, KEY.packed(), "mlp_output", _single())
    assert torch.equal(torch.rand(4), expected)


def test_operators_are_what_the_compiler_is_told() -> None:
    """torch's own check of shapes, strides and gradients of an operator without its real computation."""
    ops = torch.ops.megatron_lite
    of_mask = (KEY.packed(), [3, 5], torch.float32, torch.device("cpu"), 0.5, 1, "site", -1)
    torch.library.opcheck(ops.dropout_mask.default, of_mask)
    heads = [torch.randn(2, groups, 4, 8, requires_grad=True) for groups in (4, 2, 2)]
    bias = torch.randn(1, 4, 4, 4, requires_grad=True)
    for mask in (None, bias):
        torch.library.opcheck(
            ops.dropping_attention.default, (*heads, mask, KEY.packed(), mask is None, None, 0.5, 1, "site", 0)
        )
