"""The output head and the loss in one operation: logits exist for one chunk of tokens at a time.

What the backward pass starts with is known ahead, because loss weights are scaled before the step. So each chunk's
gradients are computed in the forward pass, while its logits are there, and the backward pass only hands them out: three
matrix products, as without fusion. To compute the logits again in the backward pass would be a fourth.

Under tensor parallelism each chunk needs one small all-gather (two numbers a token) for its softmax. The sum of the
hidden states' gradients over the ranks is one message for the whole micro-batch, as in any column-parallel layer.

Shapes: b micro-batch, s sequence, r rows (b s tokens), h hidden, v padded vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lite.parallel.collectives import Started, all_gather_sequence, finished
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.cross_entropy import Slopes, cross_entropy_
from megatron_lite.parallel.head_chunks import rows_per_chunk
from megatron_lite.parallel.layers import HeadWeights, SharedGradient, start_sum

Terms: TypeAlias = Callable[[Tensor, Tensor, Tensor], Mapping[str, Tensor]]
"""From cross-entropies, logs of the softmax's denominators and loss weights of some tokens, [r] each: scalars by name,
which are added to the gradient but not to the loss. Those of all tokens must be the sum of those of the chunks."""


class TokenLosses(NamedTuple):
    """What the fused head returns; all fp32."""

    loss: Tensor  # scalar: sum of weight x cross-entropy; its backward pass has the terms' gradients, too
    losses: Tensor  # [b, s] cross-entropies, without gradients
    log_sums: Tensor  # [b, s] logs of the softmax's denominators, without gradients


@dataclass(frozen=True)
class FusedHead:
    """Applies the head to hidden states and computes the loss, chunk by chunk."""

    vocab_size: int
    """Without padding."""
    chunk_tokens: int | None = None
    """Tokens whose logits exist at once; None = as `head_chunks.rows_per_chunk` says."""

    def __call__(
        self,
        hidden: Tensor,
        head: HeadWeights,
        labels: Tensor,
        loss_weights: Tensor,
        *,
        terms: Terms,
        see: Callable[[Tensor, Tensor, Tensor], None],
    ) -> TokenLosses:
        """A collective of the tensor-parallel group.

        Args:
            hidden: [b, s, h], or [b, s/t, h] under sequence parallelism.
            labels, loss_weights: [b, s].
            terms: called without tokens, too, to learn whether there are any.
            see: called with each chunk's logits [r, v/t], labels [r] and loss weights [r].
        """
        rows = _rows(hidden, head.context)  # [r, h]
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        flat_labels, flat_weights = labels.reshape(-1), loss_weights.reshape(-1).float()
        losses, log_sums = (torch.empty_like(flat_weights) for _ in range(2))
        seed, gradients = head.context.auxiliary.gradient, None
        if torch.is_grad_enabled():
            gradients = _Gradients(hidden, head, rows.shape[0], is_chunked=len(self._chunks(rows, weight)) > 1)
        buffer = None
        for chunk in self._chunks(rows, weight):
            x, label, token_weight = rows[chunk], flat_labels[chunk], flat_weights[chunk]
            buffer = weight.new_empty(len(x), len(weight)) if buffer is None else buffer
            logits = _product(x, weight, bias, out=buffer[: len(x)])
            see(logits, label, token_weight)
            slopes = None if gradients is None else _slopes(token_weight, seed, terms)
            losses[chunk], log_sums[chunk] = cross_entropy_(logits, label, head.context, self.vocab_size, slopes)
            if gradients is not None:
                gradients.add(logits, x, weight, chunk, head.context)
        loss = (losses * flat_weights).view_as(labels).sum(-1).sum()
        if gradients is not None:
            loss = _Given.apply(loss, hidden, head.weight, head.bias, gradients, seed, head.shared)
        return TokenLosses(loss, losses.view_as(labels), log_sums.view_as(labels))

    def _chunks(self, rows: Tensor, weight: Tensor) -> list[slice]:
        """Consecutive ranges of rows."""
        step = self.chunk_tokens or rows_per_chunk(len(rows), len(weight) * weight.element_size(), rows.device.type)
        return [slice(start, min(start + step, len(rows))) for start in range(0, len(rows), step)]


def _rows(hidden: Tensor, context: ParallelContext) -> Tensor:
    """[b, s, h], or its slice [b, s/t, h] -> [b s, h] of the whole micro-batch, without gradients."""
    x = hidden.detach()
    if context.sequence_parallel:
        x = all_gather_sequence(x, context.tensor_group)
    return x.reshape(-1, x.shape[-1])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _slopes(weights: Tensor, seed: float, terms: Terms) -> Slopes:
    """Derivatives of the loss and of its terms, times `seed`."""
    if not terms(*weights.new_empty(3, 0)):
        return weights * seed

    def of(losses: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaves = losses.detach().requires_grad_(), log_sums.detach().requires_grad_()
            total = (leaves[0] * weights).sum() + sum(terms(*leaves, weights).values())
            by_loss, by_log_sum = torch.autograd.grad(total * seed, leaves, allow_unused=True)
        return by_loss, torch.zeros_like(by_loss) if by_log_sum is None else by_log_sum

    return of


class _Gradients:
    """The gradients of hidden states, weight and bias, added up over the chunks; None = not needed."""

    def __init__(self, hidden: Tensor, head: HeadWeights, rows: int, *, is_chunked: bool) -> None:
        needs_hidden = hidden.requires_grad
        self.shape = hidden.shape
        self.hidden = hidden.new_empty(rows, hidden.shape[-1]) if needs_hidden else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self._needs_weight = head.weight.requires_grad
        self._needs_bias = head.bias is not None and head.bias.requires_grad
        self._is_chunked = is_chunked
        self._started: Started | None = None

    def add(self, logits_gradient: Tensor, x: Tensor, weight: Tensor, chunk: slice, context: ParallelContext) -> None:
        """Add those of one chunk; a collective of the tensor-parallel group with the last one."""
        if self.hidden is not None:
            torch.mm(logits_gradient, weight, out=self.hidden[chunk])
            if chunk.stop == len(self.hidden):  # first, so that communication overlaps with the product that follows
                self._start_sum(context)
        if self._needs_weight:
            self._add_weight(logits_gradient.t(), x)
        if self._needs_bias:
            bias = logits_gradient.sum(0, dtype=torch.float32)
            self.bias = bias if self.bias is None else self.bias.add_(bias)

    def _start_sum(self, context: ParallelContext) -> None:
        assert self.hidden is not None
        batch = self.shape[0]
        whole = self.hidden.view(batch, -1, self.shape[-1])  # [b, s, h]
        if context.tensor_group is None:
            self.hidden = whole
        else:
            self._started = start_sum(whole, context.tensor_group, context.sequence_parallel)

    def _add_weight(self, gradient: Tensor, x: Tensor) -> None:
        """gradient [v/t, r] times x [r, h]. Chunks in 16 bits are summed in fp32, since each sum would be rounded."""
        if self.weight is None:
            self.weight = torch.mm(gradient, x)
            if self._is_chunked:
                self.weight = self.weight.float()
        elif x.dtype is torch.float32:
            self.weight.addmm_(gradient, x)
        else:
            self.weight.add_(torch.mm(gradient, x))

    def take(self) -> list[Tensor | None]:
        """The gradients, which this object then no longer holds: autograd copies a gradient that is held elsewhere."""
        if self._started is not None:
            self.hidden = finished(self._started)
        taken = [self.hidden, self.weight, self.bias]
        self.hidden = self.weight = self.bias = self._started = None
        return taken


class _Given(torch.autograd.Function):
    """A loss whose gradients have been computed for a backward pass that starts with `seed`."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradients: _Gradients,
        seed: float,
        shared: SharedGradient | None,
    ) -> Tensor:
        ctx.gradients, ctx.seed, ctx.shared = gradients, seed, shared
        ctx.dtypes = [None if one is None else one.dtype for one in (hidden, weight, bias)]
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the fused head computes its gradients once; a second backward pass has none")
        given, ctx.gradients = ctx.gradients.take(), None
        ratio = grad / ctx.seed
        # On a GPU the comparison would wait for the device, which takes longer than the multiplication.
        if grad.device.type != "cpu" or float(ratio) != 1.0:
            given = [None if one is None else one.mul_(ratio) for one in given]
        found = [None if one is None else one.to(kind) for one, kind in zip(given, ctx.dtypes, strict=True)]
        if ctx.shared is not None and found[1] is not None:
            ctx.shared.offer(found[1])
        return None, *found, None, None, None
