"""The gradient of a tied word embedding is added to the head's, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.fused_head import FusedHead, TokenLosses
from megatron_lite.parallel.layers import HeadWeights, VocabParallelEmbedding
from megatron_lite.parallel.sharding import Init

ROWS, HIDDEN, TOKENS = 64, 8, 100  # every token occurs often


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _case(dtype: torch.dtype) -> tuple[VocabParallelEmbedding, list[Tensor], Tensor]:
    """A table, two inputs (as encoder and decoder have) and labels."""
    generator = torch.Generator().manual_seed(4)
    context = ParallelContext.single()
    table = VocabParallelEmbedding(ROWS, HIDDEN, context, padded_vocab_size=ROWS, init=Init.normal(1.0))
    with torch.no_grad():
        table.weight.copy_(torch.randn(ROWS, HIDDEN, generator=generator))
    inputs = list(torch.randint(5, (2, 1, TOKENS), generator=generator))
    return table.to(dtype), inputs, torch.zeros(1, TOKENS, dtype=torch.int64)


def _head(hidden: Tensor, head: HeadWeights, labels: Tensor) -> TokenLosses:
    weights = torch.full(labels.shape, 1.0 / TOKENS)
    return FusedHead(ROWS, 30)(hidden, head, labels, weights, terms=lambda *_: {}, see=lambda *_: None)


def _backward(table: VocabParallelEmbedding, inputs: list[Tensor], labels: Tensor) -> list[str]:
    """Names of the operations in the backward pass."""
    hidden = table(inputs[0]) + table(inputs[1])
    loss = table(hidden, lambda x, head: _head(x, head, labels)).loss
    with _Operations() as operations:
        loss.backward()
    return operations.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_added_to_the_gradient_of_the_head(dtype: torch.dtype) -> None:
    table, inputs, labels = _case(dtype)
    weight = table.weight.detach().double().requires_grad_()
    hidden = F.embedding(inputs[0], weight) + F.embedding(inputs[1], weight)
    F.cross_entropy(F.linear(hidden, weight)[0], labels[0]).backward()
    for micro_batch in (1, 2):  # the second adds to `grad`
        names = _backward(table, inputs, labels)
        assert names.count("index_add_") == (2 if dtype is torch.float32 else 4)
        assert "embedding_dense_backward" not in names
        assert "clone" not in names, "autograd took the gradient over"
        error = (table.weight.grad.double() - micro_batch * weight.grad).norm()
        assert error <= (1e-6 if dtype is torch.float32 else 2.0**-6) * micro_batch * weight.grad.norm()


def test_many_small_gradients_of_a_token_are_not_lost_in_bf16() -> None:
    table, *_ = _case(torch.bfloat16)
    embedded = table(torch.zeros(1, 2000, dtype=torch.int64))
    of_head = torch.ones(ROWS, HIDDEN, dtype=torch.bfloat16)
    table._shared.offer(of_head)
    embedded.backward(torch.full_like(embedded, 2.0**-9))  # 1 + one of them is 1 in bf16
    assert torch.equal(of_head[0], torch.full((HIDDEN,), 1.0 + 2000 * 2.0**-9).bfloat16())
    assert (of_head[1:] == 1.0).all()


def test_a_table_without_a_head_has_a_gradient_of_its_own() -> None:
    table, inputs, _ = _case(torch.float32)
    twin = table.weight.detach().clone().requires_grad_()
    table(inputs[0]).square().sum().backward()
    F.embedding(inputs[0], twin).square().sum().backward()
    torch.testing.assert_close(table.weight.grad, twin.grad)


def test_a_forward_pass_without_a_backward_pass_leaves_the_next_one_right() -> None:
    table, inputs, labels = _case(torch.float32)
    _backward(table, inputs, labels)
    expected = table.weight.grad.clone()
    table.weight.grad = None
    table(inputs[0])  # no head follows
    _backward(table, inputs, labels)
    torch.testing.assert_close(table.weight.grad, expected, rtol=0.0, atol=0.0)
