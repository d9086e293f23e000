"""The activations passed from layer to layer, and those sent from one pipeline stage to the next.

Shapes: b micro-batch, s positions of the current stack, e positions of the encoder, h hidden, n heads, v vocabulary,
t tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from megatron_lite.models.fields import Field
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.layers import HeadUse

Head: TypeAlias = Callable[[Tensor, HeadUse], Any]
"""The output head: calls its second argument with hidden states and the head's weights, and returns the result."""


@dataclass(frozen=True)
class Activations:
    """Everything that layers pass on. A model uses some of the fields; the others stay None."""

    tokens: Tensor | None = None  # [b, s] int64
    segments: Tensor | None = None  # [b, s] int64: which segment of a pair a token belongs to
    decoder_tokens: Tensor | None = None  # [b, s] int64
    lengths: Tensor | None = None  # [b] int64: positions of the (encoder's) input that are not padding
    prefix_lengths: Tensor | None = None  # [b] int64: leading positions with bidirectional attention
    hidden: Tensor | None = None  # [b, s, h], or [b, s/t, h] under sequence parallelism
    memory: Tensor | None = None  # [b, e, h], or [b, e/t, h]: the encoder's output, for cross-attention
    position_bias: Tensor | None = None  # [1 or b, n/t, s, s]: relative position bias; recomputed on each stage
    head: Head | None = None  # applied to `hidden` by whoever wants logits, or only the loss
    sequence_logits: Tensor | None = None  # [b, 2]: output of the next-sentence head


FLOATS = ("hidden", "memory")


class StageBoundary:
    """The activations sent to a stage, packed into at most one float and one int64 tensor.

    DeepSpeed sends a stage's outputs tensor by tensor and runs one backward pass per float tensor. Packing them costs
    one message per dtype and one backward pass. Packed along dimension 1, hidden states are [b, s + e, h] and integers
    [b, sum of their lengths].
    """

    def __init__(self, stage_inputs: Sequence[Field], hidden_size: int, context: ParallelContext) -> None:
        self._floats = [field for field in stage_inputs if field.name in FLOATS]
        self._integers = [field for field in stage_inputs if field.name not in FLOATS]
        self._hidden_size = hidden_size
        self._split = context.tensor_size if context.sequence_parallel else 1

    def pack(self, x: Activations) -> Tensor | tuple[Tensor, ...]:
        """The tensors to send; a single tensor if there is only one."""
        parts = []
        if self._floats:
            parts.append(_joined([_taken(x, field) for field in self._floats]))
        if self._integers:
            columns = [_taken(x, field) for field in self._integers]
            parts.append(_joined([part.unsqueeze(1) if part.dim() == 1 else part for part in columns]))
        return parts[0] if len(parts) == 1 else tuple(parts)

    def unpack(self, sent: Tensor | Sequence[Tensor]) -> Activations:
        parts = [sent] if isinstance(sent, Tensor) else list(sent)
        found: dict[str, Tensor] = {}
        if self._floats:
            lengths = [self._float_length(field) for field in self._floats]
            found |= zip([f.name for f in self._floats], parts.pop(0).split(lengths, dim=1), strict=True)
        if self._integers:
            columns = parts.pop(0).split([field.length or 1 for field in self._integers], dim=1)
            for field, column in zip(self._integers, columns, strict=True):
                found[field.name] = column.squeeze(1) if field.length is None else column
        assert not parts
        return Activations(**found)

    def empty(self, batch: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Receive buffers for what `pack` returns for `batch` samples, in the same order."""
        buffers = []
        if self._floats:
            length = sum(map(self._float_length, self._floats))
            buffers.append(torch.empty(batch, length, self._hidden_size, dtype=dtype, device=device))
        if self._integers:
            columns = sum(field.length or 1 for field in self._integers)
            buffers.append(torch.empty(batch, columns, dtype=torch.int64, device=device))
        return buffers

    def _float_length(self, field: Field) -> int:
        assert field.length is not None
        return field.length // self._split


def _taken(x: Activations, field: Field) -> Tensor:
    tensor = getattr(x, field.name)
    assert tensor is not None, f"a later stage takes {field.name}, which no layer before it has left"
    return tensor


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=1)
