"""Cross-entropy of logits whose vocabulary is split over the tensor-parallel group; the logits are never gathered.

Shapes: b micro-batch, s sequence, v padded vocabulary, t tensor-parallel size, r rows (b s).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_lite.parallel.context import ParallelContext

_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Size of fp32 temporaries: 1 MB stays in the cache of a CPU core, 256 MB keeps a GPU busy."""

_FP16_SCALE = 2.0**15
"""Probabilities are stored in the logits' buffer; without this factor fp16 would lose those below 6e-5."""


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, context: ParallelContext, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """-log softmax(logits)[label], and the log of the softmax's denominator; in fp32 whatever the dtype of the logits.

    If the logits require a gradient, their memory is reused: the forward pass overwrites them with the probabilities,
    the backward pass with the gradient. No other tensor of the logits' size is allocated. Autograd raises an error if
    another operation needs the logits in its backward pass, and on a second backward pass.

    Args:
        logits: [b, s, v/t] contiguous, this rank's columns; any float dtype.
        labels: [b, s] int64 global token ids. A label outside [0, vocab_size) gives a finite but meaningless loss; the
            caller must give it weight 0.
        vocab_size: size without padding; columns from this index on are padding and are ignored.
    Returns:
        Loss and log(sum(exp(logits))), each [b, s] fp32, in nats, equal on all ranks of the tensor-parallel group.
    """
    return _CrossEntropy.apply(logits, labels, context, vocab_size)


@torch.no_grad()
def vocab_parallel_argmax(logits: Tensor, context: ParallelContext, vocab_size: int) -> Tensor:
    """The token with the largest logit, equal on all ranks of the tensor-parallel group.

    Args:
        logits: [b, s, v/t], this rank's columns.
        vocab_size: size without padding; columns from this index on are padding and are ignored.
    Returns:
        [b, s] int64
    """
    start, valid = _valid_columns(logits, context, vocab_size)
    if valid:
        largest, token = logits[..., :valid].max(-1)
    else:
        largest = logits.new_full(logits.shape[:-1], -torch.inf)
        token = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    token = token + start
    if context.tensor_group is None:
        return token
    size = context.tensor_size
    gathered_largest, gathered_token = largest.new_empty(size, largest.numel()), token.new_empty(size, token.numel())
    for gathered, own in ((gathered_largest, largest), (gathered_token, token)):
        dist.all_gather_into_tensor(gathered.view(-1), own.reshape(-1).contiguous(), group=context.tensor_group)
    owner = gathered_largest.argmax(0, keepdim=True)  # [1, b s]
    return gathered_token.gather(0, owner).view_as(token)


def without_padding(logits: Tensor, context: ParallelContext, vocab_size: int) -> Tensor:
    """This rank's columns [b, s, v/t] without the padding of the vocabulary; empty if the rank holds only padding."""
    return logits[..., : _valid_columns(logits, context, vocab_size)[1]]


def _valid_columns(logits: Tensor, context: ParallelContext, vocab_size: int) -> tuple[int, int]:
    """Global token id of this rank's first column, and how many of its columns are not padding."""
    columns = logits.shape[-1]
    start = context.tensor_rank * columns
    return start, min(max(vocab_size - start, 0), columns)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, context: ParallelContext, vocab_size: int
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        start, valid = _valid_columns(logits, context, vocab_size)
        rows = logits.view(-1, logits.shape[-1])
        owned, index = _locate(labels.reshape(-1) - start, valid)
        label_logit = torch.where(owned, rows.gather(1, index).squeeze(1).float(), 0.0)  # [r]
        stored_scale = _FP16_SCALE if logits.dtype is torch.float16 else 1.0
        own_log_sum = _softmax_rows(rows[:, :valid], stored_scale if ctx.needs_input_grad[0] else None)
        log_sum, label_logit_of_all = _combine(own_log_sum, label_logit, context.tensor_group)
        if ctx.needs_input_grad[0]:
            ctx.valid = valid
            factor = torch.exp(own_log_sum - log_sum) / stored_scale  # stored -> probability over all ranks' columns
            label_probability = torch.exp(label_logit - log_sum)
            ctx.save_for_backward(logits, factor, label_probability, owned, index)
        return (log_sum - label_logit_of_all).view_as(labels), log_sum.view_as(labels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_log_sum: Tensor | None) -> tuple[Tensor, None, None, None]:
        """(softmax - one_hot(label)) * grad + softmax * grad_log_sum; the label's own entry is computed in fp32, since
        probability - 1 cancels to zero in half precision."""
        logits, factor, label_probability, owned, index = ctx.saved_tensors
        rows, grad = logits.view(-1, logits.shape[-1]), grad.reshape(-1)
        rows[:, ctx.valid :] = 0.0
        of_softmax = grad if grad_log_sum is None else grad + grad_log_sum.reshape(-1)
        scale = (factor * of_softmax)[:, None]
        for chunk in _chunks(rows):  # bf16 times fp32 on the whole tensor would allocate an fp32 copy of the logits
            rows[chunk] = rows[chunk].float().mul_(scale[chunk])
        at_label = (label_probability - 1.0) * grad
        if grad_log_sum is not None:
            at_label += label_probability * grad_log_sum.reshape(-1)
        at_label = at_label.to(rows.dtype)
        # Indexed assignment, because a bf16 scatter on a CPU copies the logits to fp32 and back. It assigns to every
        # row: the host would have to wait for the device to learn which rows are owned.
        at = torch.arange(len(rows), device=rows.device), index[:, 0]
        rows[at] = torch.where(owned, at_label, rows[at])
        return logits, None, None, None


def _locate(local: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """Whether each label is in this rank's columns [r], and its column, 0 if it is not [r, 1].

    Args:
        local: [r] labels relative to this rank's first column.
    """
    owned = (local >= 0) & (local < valid)
    return owned, local.masked_fill(~owned, 0).unsqueeze(1)


def _softmax_rows(rows: Tensor, stored_scale: float | None) -> Tensor:
    """log(sum(exp)) of each row in fp32. Overwrites the rows with stored_scale * softmax; None = rows are kept."""
    log_sum = rows.new_full(rows.shape[:1], -torch.inf, dtype=torch.float32)
    for chunk in _chunks(rows):
        exact = rows[chunk].float()
        softmax = torch.softmax(exact, -1)
        # At the largest logit x, log(sum(exp)) = x - log(softmax): no second pass of exponentials.
        log_sum[chunk] = exact.amax(-1) - softmax.amax(-1).log_()
        if stored_scale is not None:
            rows[chunk] = softmax if stored_scale == 1.0 else softmax.mul_(stored_scale)
    return log_sum


def _chunks(rows: Tensor) -> Iterator[slice]:
    """Consecutive ranges of rows with about _CHUNK_ELEMENTS elements; none if the rank holds only padding."""
    if rows.shape[1] == 0:
        return
    step = max(1, _CHUNK_ELEMENTS[rows.device.type] // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        yield slice(start, start + step)


def _combine(log_sum: Tensor, label_logit: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Both [r]: from this rank's columns to the whole vocabulary, in a single all-gather.

    log_sum cannot be all-reduced: a plain sum of exponentials overflows, and a maximum first would cost a second
    message.
    """
    if group is None:
        return log_sum, label_logit
    own = torch.stack([log_sum, label_logit], dim=1)  # [r, 2]
    gathered = own.new_empty(group.size() * own.shape[0], 2)
    dist.all_gather_into_tensor(gathered, own, group=group)
    log_sums, label_logits = gathered.view(group.size(), -1, 2).unbind(2)  # [t, r] each
    return log_sums.logsumexp(0), label_logits.sum(0)
