"""Compute the training loss from a model's last hidden states and targets, and count correct predictions.

Shapes: b micro-batch, s positions whose labels are predicted, r tokens of a chunk, v vocabulary, t tensor-parallel
size.
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
from megatron_lite.models.activations import Activations
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.cross_entropy import vocab_parallel_argmax
from megatron_lite.parallel.fused_head import FusedHead, TokenLosses
from megatron_lite.parallel.layers import HeadWeights

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
    head_chunk: int | None = None
    """`train.head_chunk`."""
    _counts: EvaluationCounts | None = field(default=None, init=False)
    sequences: list[Tensor] = field(default_factory=list, compare=False)
    """[2, b] for each training micro-batch since `begin_step`: the loss share and the token weight of each sequence.
    Kept on the device, to avoid a synchronisation."""
    token_shares: list[Tensor] = field(default_factory=list, compare=False)
    """For the same micro-batches, the part of the loss from tokens if samples have a class; otherwise empty."""

    def __call__(self, x: Activations, targets: Targets) -> Tensor:
        """
        Args:
            x: what the last layer of the model leaves. The logits are computed here, some tokens at a time.
        Returns:
            scalar, fp32
        """
        assert x.head is not None
        labels, loss_weights, *sequence_targets = targets

        def losses_of(hidden: Tensor, head: HeadWeights) -> TokenLosses:
            fused = FusedHead(self.vocab_size, self.head_chunk)
            return fused(hidden, head, labels, loss_weights, terms=self.terms, see=self.see)

        loss, losses, log_sums = x.head(x.hidden, losses_of)
        for name, term in self.terms(losses, log_sums, loss_weights).items():
            self.context.auxiliary.measure(name, term)
        if self._counts is not None:
            self._counts.tokens[1:] += _sums(losses, loss_weights)
        shares = (losses * loss_weights).sum(-1)  # [b]
        if x.sequence_logits is not None:
            class_shares = self._class_losses(x.sequence_logits.float(), *sequence_targets)  # [b]
            loss = loss + class_shares.sum()
            if torch.is_grad_enabled():
                self.token_shares.append(shares.sum())
            shares = shares + class_shares.detach()
        if torch.is_grad_enabled():
            self.sequences.append(torch.stack([shares, loss_weights.sum(-1)]))
        return loss

    def terms(self, losses: Tensor, log_sums: Tensor, loss_weights: Tensor) -> dict[str, Tensor]:
        """Auxiliary losses of some tokens, by name: they are in the gradients and measured, but not in the loss.

        Each is a sum over the tokens: that of a micro-batch is the sum of those of its chunks.

        Args:
            losses, log_sums, loss_weights: of each token: cross-entropy, log(Z) of the softmax's denominator Z, and
                the weight with which a sum over the tokens becomes the mean over those of the global batch.
        """
        terms, settings = {}, self.settings
        if settings.z_loss_weight:  # mean(log(Z)^2) (PaLM, arXiv 2204.02311, section 5)
            terms["z_loss"] = settings.z_loss_weight * (log_sums.square() * loss_weights).sum()
        return terms

    def see(self, logits: Tensor, labels: Tensor, loss_weights: Tensor) -> None:
        """Look at the logits of some tokens, before they are overwritten with their gradient.

        Args:
            logits: [r, v/t], this rank's columns; labels, loss_weights: [r].
        """
        if self._counts is not None:
            right = vocab_parallel_argmax(logits, self.context, self.vocab_size) == labels
            self._counts.tokens[0] += (right * loss_weights).sum(dtype=torch.float64)

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
            right = (logits.argmax(-1) == labels) * weights
            self._counts.sequences[0] += right.sum(dtype=torch.float64)
            self._counts.sequences[1:] += _sums(losses, weights)
        return losses * weights


def _sums(losses: Tensor, weights: Tensor) -> Tensor:
    """[2] fp64: weighted sum of losses, sum of weights."""
    return torch.stack([(losses * weights).sum(dtype=torch.float64), weights.sum(dtype=torch.float64)])
