"""Cross-entropy of logits whose vocabulary is split over the tensor-parallel group; the logits are never gathered.

Shapes: b micro-batch, s sequence, v padded vocabulary, t tensor-parallel size, r rows (tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.head_chunks import SOFTMAX_ELEMENTS

_FP16_SCALE = 2.0**15
"""Probabilities are stored in the logits' buffer; without this factor fp16 would lose those below 6e-5."""

Slopes: TypeAlias = Tensor | Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Derivatives of the training loss with respect to each row's cross-entropy [r], if they are known ahead; otherwise a
function of the cross-entropies and of the logs of the denominators, that returns the derivatives by both, [r] each."""


@torch.no_grad()
def cross_entropy_(
    logits: Tensor, labels: Tensor, context: ParallelContext, vocab_size: int, slopes: Slopes | None = None
) -> tuple[Tensor, Tensor]:
    """-log softmax(logits)[label], and the log of the softmax's denominator; in fp32 whatever the dtype of the logits.

    A collective of the tensor-parallel group.

    Args:
        logits: [r, v/t], this rank's columns; any float dtype. With `slopes` they are overwritten with their gradient;
            no other tensor of their size is allocated.
        labels: [r] int64 global token ids. A label outside [0, vocab_size) gives a finite but meaningless loss; the
            caller must give it weight 0.
        vocab_size: size without padding; columns from this index on are padding and are ignored.
    Returns:
        Loss and log(sum(exp(logits))), each [r] fp32, in nats, equal on all ranks of the tensor-parallel group.
    """
    start, valid = _valid_columns(logits, context, vocab_size)
    owned, column = _locate(labels - start, valid)
    row = torch.arange(len(labels), device=labels.device)
    label_logit = torch.where(owned, logits[row, column].float(), 0.0)
    # If the slopes are known and no other rank has a part of the softmax, one pass writes the gradient.
    is_final = isinstance(slopes, Tensor) and context.tensor_group is None
    stored_scale = _FP16_SCALE if logits.dtype is torch.float16 else 1.0
    factors = None if slopes is None else slopes if is_final else torch.full_like(label_logit, stored_scale)
    own_log_sum = _softmax_rows_(logits[:, :valid], factors)
    log_sum, label_logit_of_all = _combine(own_log_sum, label_logit, context.tensor_group)
    losses = log_sum - label_logit_of_all
    if slopes is None:
        return losses, log_sum
    of_loss, of_log_sum = (slopes, None) if isinstance(slopes, Tensor) else slopes(losses, log_sum)
    of_softmax = of_loss if of_log_sum is None else of_loss + of_log_sum
    if not is_final:
        _scale_rows_(logits[:, :valid], torch.exp(own_log_sum - log_sum) / stored_scale * of_softmax)
    logits[:, valid:] = 0.0
    # The label's own entry is computed in fp32, since probability - 1 cancels to zero in half precision.
    label_probability = torch.exp(label_logit - log_sum)
    at_label = (label_probability - 1.0) * of_loss
    if of_log_sum is not None:
        at_label += label_probability * of_log_sum
    # Indexed assignment, because a bf16 scatter on a CPU copies the logits to fp32 and back.
    logits[row, column] = torch.where(owned, at_label.to(logits.dtype), logits[row, column])
    return losses, log_sum


@torch.no_grad()
def vocab_parallel_argmax(logits: Tensor, context: ParallelContext, vocab_size: int) -> Tensor:
    """The token with the largest logit, equal on all ranks of the tensor-parallel group.

    Args:
        logits: [..., v/t], this rank's columns.
        vocab_size: size without padding; columns from this index on are padding and are ignored.
    Returns:
        [...] int64
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
    """This rank's columns [..., v/t] without the padding of the vocabulary; empty if the rank holds only padding."""
    return logits[..., : _valid_columns(logits, context, vocab_size)[1]]


def _valid_columns(logits: Tensor, context: ParallelContext, vocab_size: int) -> tuple[int, int]:
    """Global token id of this rank's first column, and how many of its columns are not padding."""
    columns = logits.shape[-1]
    start = context.tensor_rank * columns
    return start, min(max(vocab_size - start, 0), columns)


def _locate(local: Tensor, valid: int) -> tuple[Tensor, Tensor]:
    """Whether each label is in this rank's columns [r], and its column, 0 if it is not [r].

    Args:
        local: [r] labels relative to this rank's first column.
    """
    owned = (local >= 0) & (local < valid)
    return owned, local.masked_fill(~owned, 0)


def _softmax_rows_(rows: Tensor, factors: Tensor | None) -> Tensor:
    """log(sum(exp)) of each row in fp32. Overwrites the rows with factor x softmax; None = rows are kept."""
    log_sum = rows.new_full(rows.shape[:1], -torch.inf, dtype=torch.float32)
    for chunk in _chunks(rows):
        exact = rows[chunk].float()
        softmax = torch.softmax(exact, -1)
        # At the largest logit x, log(sum(exp)) = x - log(softmax): no second pass of exponentials.
        log_sum[chunk] = exact.amax(-1) - softmax.amax(-1).log_()
        if factors is not None:
            torch.mul(softmax, factors[chunk, None], out=rows[chunk])
    return log_sum


def _scale_rows_(rows: Tensor, factors: Tensor) -> None:
    for chunk in _chunks(rows):  # bf16 times fp32 on the whole tensor would allocate an fp32 copy of the logits
        torch.mul(rows[chunk], factors[chunk, None], out=rows[chunk])


def _chunks(rows: Tensor) -> Iterator[slice]:
    """Consecutive ranges of rows with about SOFTMAX_ELEMENTS elements; none if the rank holds only padding."""
    if rows.shape[1] == 0:
        return
    step = max(1, SOFTMAX_ELEMENTS[rows.device.type] // rows.shape[1])
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
