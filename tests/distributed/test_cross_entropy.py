"""The fused head and its vocabulary-parallel cross-entropy, on 1, 2 and 4 ranks, against torch.nn.functional."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.parallel import cross_entropy
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.cross_entropy import cross_entropy_
from megatron_lite.parallel.fused_head import FusedHead
from megatron_lite.parallel.head_chunks import rows_per_chunk
from megatron_lite.parallel.layers import HeadWeights
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
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    vocab_size: int,
    context: ParallelContext,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Through a head whose weight is the identity, so that hidden states are the logits."""
    leaf = logits.clone().requires_grad_()
    own = torch.eye(logits.shape[-1], dtype=logits.dtype).chunk(context.tensor_size)[context.tensor_rank]
    found = FusedHead(vocab_size, chunk)(
        leaf, HeadWeights(context, own), labels, weights, terms=_no_terms, see=_look_away
    )
    found.loss.backward()
    torch.testing.assert_close(found.loss.detach(), (found.losses * weights).sum())
    return found.losses, leaf.grad


def _no_terms(*_: Tensor) -> dict[str, Tensor]:
    return {}


def _look_away(*_: Tensor) -> None:
    """The logits are of no interest."""


def _on_rank(size: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    context = ParallelContext.build(
        Topology(tensor_parallel_size=size), device=torch.device("cpu"), sequence_parallel=False, seed=1
    )
    return _ours(*_case(vocab_size, dtype), vocab_size, context, chunk=4)


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
    for _, rank_gradient in ranks:
        assert rank_gradient.dtype is dtype
        assert rank_gradient[..., vocab_size:].count_nonzero() == 0
        assert rank_gradient[~counted].count_nonzero() == 0
        torch.testing.assert_close(rank_gradient.float(), gradient, **GRADIENT[dtype])


def test_a_confident_label_keeps_its_gradient_in_bf16():
    """p - 1 near p = 1 must not be computed as the difference of two rounded numbers."""
    logits = torch.tensor([[[8.0, 0.0, 0.0, 0.0]]], dtype=torch.bfloat16)
    labels, weights = torch.tensor([[0]]), torch.ones(1, 1)
    _, gradient = _ours(logits, labels, weights, 4, ParallelContext.single())
    expected = torch.softmax(logits.double(), -1)[0, 0, 0] - 1.0
    torch.testing.assert_close(gradient[0, 0, 0].double(), expected, rtol=2.0**-8, atol=0.0)


@pytest.mark.parametrize("rows_at_once", [1, 2, 7, 100])
def test_chunks_do_not_change_the_result(rows_at_once: int, monkeypatch: pytest.MonkeyPatch):
    case = _case(24, torch.float32)
    whole = _ours(*case, 24, ParallelContext.single())
    monkeypatch.setitem(cross_entropy.SOFTMAX_ELEMENTS, "cpu", rows_at_once * PADDED)
    chunked = _ours(*case, 24, ParallelContext.single(), chunk=2 * rows_at_once)
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)


def test_evaluation_leaves_the_logits_alone():
    logits, labels, _ = _case(24, torch.float32)
    rows = logits.flatten(0, 1)
    before = rows.clone()
    cross_entropy_(rows, labels.flatten(), ParallelContext.single(), 24)
    torch.testing.assert_close(rows, before, rtol=0.0, atol=0.0)


def test_a_second_backward_pass_raises():
    logits, labels, weights = _case(24, torch.float32)
    context = ParallelContext.single()
    head = HeadWeights(context, torch.eye(PADDED))
    loss = FusedHead(24)(logits.requires_grad_(), head, labels, weights, terms=_no_terms, see=_look_away).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("upstream", [1.0, 0.37])
def test_gradients_follow_what_the_backward_pass_starts_with(upstream: float, dtype: torch.dtype):
    """Expected is the loss scale over the number of micro-batches; anything else is right as well."""
    generator = torch.Generator().manual_seed(2)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((BATCH, SEQUENCE, 8), (24, 8), (24,))
    )
    _, labels, weights = _case(24, dtype)
    labels = labels.clamp(0, 23)
    context = ParallelContext.single()
    context.auxiliary.begin_step(0.25)
    ours, theirs = ([one.clone().requires_grad_() for one in (x, weight, bias)] for _ in range(2))
    fused = FusedHead(24, chunk_tokens=4)
    loss = fused(ours[0], HeadWeights(context, *ours[1:]), labels, weights, terms=_no_terms, see=_look_away).loss
    (loss * upstream).backward()
    logits = F.linear(theirs[0].float(), *(one.float() for one in theirs[1:])).to(dtype).float()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    (upstream * (losses * weights.flatten()).sum()).backward()
    tolerance = 1e-6 if dtype is torch.float32 else 2.0**-6
    for mine, exact in zip(ours, theirs, strict=True):
        assert mine.grad.dtype is dtype
        assert (mine.grad - exact.grad).float().norm() <= tolerance * exact.grad.float().norm()


class _LargestOutput(TorchDispatchMode):
    """Records the largest storage that an operation creates; views of it and results of other sizes do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            if isinstance(one, Tensor):
                self.most = max(self.most, one.untyped_storage().nbytes() // one.element_size())
        return made


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("chunk", [None, 64, 10])
def test_only_the_logits_of_a_chunk_exist(chunk: int | None, evaluates: bool):
    tokens, hidden, vocabulary = 256, 4, 512
    x = torch.randn(2, tokens // 2, hidden, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, requires_grad=True)
    labels, weights = torch.zeros(2, tokens // 2, dtype=torch.int64), torch.ones(2, tokens // 2)
    head = HeadWeights(ParallelContext.single(), weight)
    with _LargestOutput() as outputs, torch.set_grad_enabled(not evaluates):
        loss = FusedHead(vocabulary, chunk)(x, head, labels, weights, terms=_no_terms, see=_look_away).loss
        if not evaluates:
            loss.backward()
    assert outputs.most == (chunk or tokens) * vocabulary, "the rows of a chunk, and not one more"


@given(st.integers(1, 5000), st.integers(1, 1 << 26))
def test_chunks_fit_the_buffer_and_are_even(rows: int, row_bytes: int):
    step = rows_per_chunk(rows, row_bytes, "cpu")
    most = max(64, (128 << 20) // row_bytes)
    assert 1 <= step <= max(most + 63, 64)
    assert step == rows or step % 64 == 0
    assert -(-rows // step) <= -(-rows // most), "no more chunks than have to be"
