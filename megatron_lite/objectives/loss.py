"""Compute the training loss from logits and targets, and count correct predictions.

Shapes: b micro-batch, s positions whose labels are predicted, v vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.config.schema import OptimizerConfig
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.cross_entropy import vocab_parallel_argmax, vocab_parallel_cross_entropy

Outputs: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""Logits [b, s, v/t], this rank's slice of the padded vocabulary; and, if the model has a head that classifies whole
samples, its logits [b, classes]."""

Targets: TypeAlias = tuple[Tensor, ...]
"""Labels [b, s] and loss weights [b, s]; and, if samples have a class, sequence labels [b] and weights [b]."""


@dataclass
class EvaluationCounts:
    """Weighted sums over the predictions of one rank's share of a batch."""

    tokens: Tensor  # [3] fp64: number of correct predictions, loss in nats, number of predictions
    sequences: Tensor  # [3] fp64: the same for the samples' classes

    @classmethod
    def none(cls, device: torch.device) -> EvaluationCounts:
        return cls(*torch.zeros(2, 3, dtype=torch.float64, device=device))


@dataclass
class TokenLoss:
    """Weighted sum of the cross-entropies of tokens and of sample classes.

    The weights carry the denominator (see `engine.loss_weights.scale_loss_weights`), so that summing over micro-batches
    and averaging over ranks gives the mean over all tokens of the global batch, however unevenly ranks share them, plus
    the mean over all its samples (BERT, arXiv 1810.04805, A.2: the sum of both means).
    """

    context: ParallelContext
    vocab_size: int
    settings: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Weights of auxiliary losses, which are in the gradients but not in what is returned."""
    _counts: EvaluationCounts | None = field(default=None, init=False)
    sequences: list[Tensor] = field(default_factory=list, compare=False)
    """[2, b] for each training micro-batch since `begin_step`: the loss share and the token weight of each sequence.
    Kept on the device, to avoid a synchronisation."""
    token_shares: list[Tensor] = field(default_factory=list, compare=False)
    """For the same micro-batches, the part of the loss from tokens if samples have a class; otherwise empty."""

    def __call__(self, outputs: Outputs, targets: Targets) -> Tensor:
        """
        Args:
            outputs: overwritten if gradients are enabled, to save memory.
        Returns:
            scalar, fp32
        """
        logits, sequence_logits = outputs if isinstance(outputs, tuple) else (outputs, None)
        labels, loss_weights, *sequence_targets = targets
        losses, log_sums = vocab_parallel_cross_entropy(logits, labels, self.context, self.vocab_size)  # [b, s] each
        if self._counts is not None:  # without gradients, so the logits are still there
            right = vocab_parallel_argmax(logits, self.context, self.vocab_size) == labels
            _count(self._counts.tokens, right, losses.detach(), loss_weights)
        shares = (losses * loss_weights).sum(-1)  # [b]
        if sequence_logits is not None:
            if torch.is_grad_enabled():
                self.token_shares.append(shares.detach().sum())
            shares = shares + self._class_losses(sequence_logits.float(), *sequence_targets)
        if torch.is_grad_enabled():
            self.sequences.append(torch.stack([shares.detach(), loss_weights.sum(-1)]))
        loss = shares.sum()
        return self._with_auxiliary_losses(loss, losses, log_sums, loss_weights)

    def _with_auxiliary_losses(self, loss: Tensor, losses: Tensor, log_sums: Tensor, loss_weights: Tensor) -> Tensor:
        """`loss` unchanged; in its backward pass these get their gradients, too.

        Args:
            losses, log_sums, loss_weights: [b, s] each: cross-entropies, log(Z) of the softmax's denominators Z, and
                weights with which a sum over the tokens becomes the mean over those of the global batch.
        """
        auxiliary, settings = self.context.auxiliary, self.settings
        if settings.z_loss_weight:  # mean(log(Z)^2) (PaLM, arXiv 2204.02311, section 5)
            z_loss = settings.z_loss_weight * (log_sums.square() * loss_weights).sum()
            loss = auxiliary.add_loss(loss, "z_loss", z_loss)
        return loss

    @contextmanager
    def counting(self) -> Iterator[EvaluationCounts]:
        """Count correct predictions during the block, without gradients."""
        self._counts = EvaluationCounts.none(self.context.device)
        try:
            with torch.no_grad():
                yield self._counts
        finally:
            self._counts = None

    def begin_step(self) -> None:
        """Begin new lists of measurements; those of the previous step may still be needed."""
        self.sequences, self.token_shares = [], []

    def _class_losses(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, labels, reduction="none")  # [b]
        if self._counts is not None:
            _count(self._counts.sequences, logits.argmax(-1) == labels, losses, weights)
        return losses * weights


def _count(sums: Tensor, right: Tensor, losses: Tensor, weights: Tensor) -> None:
    sums += torch.stack(
        [(part * weights).sum(dtype=torch.float64) for part in (right, losses, torch.ones_like(losses))]
    )
