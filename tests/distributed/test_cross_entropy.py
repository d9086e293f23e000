"""Vocab-parallel cross-entropy on 1, 2 and 4 ranks against torch.nn.functional.cross_entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.parallel import cross_entropy
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron_lite.parallel.topology import Topology
from tests.distributed.harness import run_ranks

BATCH, SEQUENCE, PADDED = 3, 5, 24
FP32 = {"rtol": 1e-5, "atol": 1e-6}
# One rounding of the result to the dtype, and one of the stored intermediate values.
GRADIENT = {
    torch.float32: FP32,
    torch.bfloat16: {"rtol": 2.0**-7, "atol": 1e-6},
    torch.float16: {"rtol": 2.0**-10, "atol": 1e-6},
}


def _case(vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Padded logits (with garbage in the padding), labels, and loss weights, some of which are 0."""
    generator = torch.Generator().manual_seed(11)
    logits = (4 * torch.randn(BATCH, SEQUENCE, PADDED, generator=generator)).to(dtype)
    logits[..., vocab_size:] = 1e4
    labels = torch.randint(vocab_size, (BATCH, SEQUENCE), generator=generator)
    weights = torch.rand(BATCH, SEQUENCE, generator=generator)
    weights[0, 1] = weights[2] = 0.0
    labels[2, 0], labels[2, 1] = -100, PADDED - 1  # ignored positions may have any label
    return logits, labels, weights


def _expected(logits: Tensor, labels: Tensor, weights: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    exact = logits[..., :vocab_size].float().requires_grad_()
    losses = F.cross_entropy(exact.flatten(0, 1), labels.clamp(0, vocab_size - 1).flatten(), reduction="none")
    losses = losses.view_as(labels)
    (losses * weights).sum().backward()
    return losses.detach(), F.pad(exact.grad, (0, PADDED - vocab_size))


def _ours(
    logits: Tensor, labels: Tensor, weights: Tensor, vocab_size: int, context: ParallelContext
) -> tuple[Tensor, Tensor]:
    leaf = logits.chunk(context.tensor_size, -1)[context.tensor_rank].clone().requires_grad_()
    losses, _ = vocab_parallel_cross_entropy(leaf * 1, labels, context, vocab_size)
    (losses * weights).sum().backward()
    return losses.detach(), leaf.grad


def _on_rank(size: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    context = ParallelContext.build(
        Topology(tensor_parallel_size=size), device=torch.device("cpu"), sequence_parallel=False, seed=1
    )
    return _ours(*_case(vocab_size, dtype), vocab_size, context)


@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize(
    ("size", "vocab_size"),
    [(1, 24), (1, 19), (2, 24), (2, 19), (4, 19), (4, 11)],  # 4 x 11: two ranks hold only padding
)
def test_matches_torch(size: int, vocab_size: int, dtype: torch.dtype):
    logits, labels, weights = _case(vocab_size, dtype)
    if size == 1:
        ranks = [_ours(logits, labels, weights, vocab_size, ParallelContext.single())]
    else:
        ranks = run_ranks(_on_rank, size, size, vocab_size, dtype)
    losses, gradient = _expected(logits, labels, weights, vocab_size)
    counted = weights > 0
    for rank_losses, _ in ranks:
        assert rank_losses.dtype is torch.float32
        assert rank_losses.isfinite().all()
        torch.testing.assert_close(rank_losses[counted], losses[counted], **FP32)
    joined = torch.cat([rank_gradient for _, rank_gradient in ranks], -1)
    assert joined.dtype is dtype
    assert joined[..., vocab_size:].count_nonzero() == 0
    assert joined[~counted].count_nonzero() == 0
    torch.testing.assert_close(joined.float(), gradient, **GRADIENT[dtype])


def test_a_confident_label_keeps_its_gradient_in_bf16():
    """p - 1 near p = 1 must not be computed as the difference of two rounded numbers."""
    logits = torch.tensor([[[8.0, 0.0, 0.0, 0.0]]], dtype=torch.bfloat16)
    labels, weights = torch.tensor([[0]]), torch.ones(1, 1)
    _, gradient = _ours(logits, labels, weights, 4, ParallelContext.single())
    expected = torch.softmax(logits.double(), -1)[0, 0, 0] - 1.0
    torch.testing.assert_close(gradient[0, 0, 0].double(), expected, rtol=2.0**-8, atol=0.0)


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 7, 100])
def test_chunks_do_not_change_the_result(rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch):
    case = _case(24, torch.float32)
    whole = _ours(*case, 24, ParallelContext.single())
    monkeypatch.setitem(cross_entropy._CHUNK_ELEMENTS, "cpu", rows_per_chunk * PADDED)
    chunked = _ours(*case, 24, ParallelContext.single())
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)


def test_evaluation_leaves_the_logits_alone():
    logits, labels, _ = _case(24, torch.float32)
    before = logits.clone()
    vocab_parallel_cross_entropy(logits, labels, ParallelContext.single(), 24)
    torch.testing.assert_close(logits, before, rtol=0.0, atol=0.0)


def test_the_gradient_takes_over_the_storage_of_the_logits():
    logits, labels, weights = _case(24, torch.float32)
    taken = logits.requires_grad_() * 1
    taken.retain_grad()
    (vocab_parallel_cross_entropy(taken, labels, ParallelContext.single(), 24)[0] * weights).sum().backward()
    torch.testing.assert_close(taken.detach(), logits.grad, rtol=0.0, atol=0.0)


def test_a_second_backward_pass_raises_instead_of_giving_a_wrong_gradient():
    logits, labels, _ = _case(24, torch.float32)
    loss = vocab_parallel_cross_entropy(logits.requires_grad_() * 1, labels, ParallelContext.single(), 24)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_operation_that_still_needs_the_logits_raises():
    logits, labels, _ = _case(24, torch.float32)
    capped = torch.tanh(logits.requires_grad_())  # its backward pass reads its own output
    loss = vocab_parallel_cross_entropy(capped, labels, ParallelContext.single(), 24)[0].sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
