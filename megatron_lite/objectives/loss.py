"""The losses of all objectives.

Shapes: b micro-batch, s sequence, v vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.cross_entropy import vocab_parallel_cross_entropy


@dataclass(frozen=True)
class TokenLoss:
    """Weighted sum of the tokens' cross-entropies.

    The weights carry the denominator (see `train.batches.normalise`), so that summing over micro-batches and averaging
    over ranks gives the mean over all tokens of the global batch, however unevenly they are spread.
    """

    context: ParallelContext
    vocab_size: int

    def __call__(self, logits: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            logits: [b, s, v/t], this rank's slice of the padded vocabulary; consumed (overwritten).
            targets: labels [b, s] and loss weights [b, s].
        Returns:
            scalar, fp32
        """
        labels, loss_weights = targets
        losses = vocab_parallel_cross_entropy(logits, labels, self.context, self.vocab_size)  # [b, s]
        return (losses * loss_weights).sum()
