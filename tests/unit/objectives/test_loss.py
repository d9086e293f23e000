"""The loss over tokens and classes, and the counts of right predictions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_lite.objectives.loss import Hits, TokenLoss
from megatron_lite.parallel.context import ParallelContext

VOCAB_SIZE, PADDED = 5, 8


def _case() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, PADDED, generator=generator)
    logits[..., VOCAB_SIZE:] = 100.0  # padding must take no part, whatever it holds
    labels = torch.randint(VOCAB_SIZE, (2, 3), generator=generator)
    weights = torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 1.0]])
    classes = torch.tensor([[0.3, -0.2], [1.0, 2.0]])
    return logits, labels, weights, classes, torch.tensor([1, 1]), torch.tensor([0.5, 0.5])


def test_sum_of_both_losses_and_its_gradients() -> None:
    logits, labels, weights, classes, class_labels, class_weights = _case()
    logits, classes = logits.requires_grad_(), classes.requires_grad_()
    per_token = F.cross_entropy(logits[..., :VOCAB_SIZE].transpose(1, 2), labels, reduction="none")
    expected = (per_token * weights).sum() + F.cross_entropy(classes, class_labels)
    expected_gradients = torch.autograd.grad(expected, (logits, classes))
    loss = TokenLoss(ParallelContext.single(), VOCAB_SIZE)
    found = loss((logits.clone(), classes), (labels, weights, class_labels, class_weights))
    gradients = torch.autograd.grad(found, (logits, classes))
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


@torch.no_grad()
def test_hits_are_weighted_like_the_loss() -> None:
    logits, labels, weights, classes, class_labels, class_weights = _case()
    loss = TokenLoss(ParallelContext.single(), VOCAB_SIZE, Hits.none(torch.device("cpu")))
    for _ in range(2):  # two micro-batches
        total = loss((logits, classes), (labels, weights, class_labels, class_weights))
    right = (logits[..., :VOCAB_SIZE].argmax(-1) == labels) * weights
    assert 0 < right.sum() < weights.sum()
    (hit, nats, tokens), (class_hit, class_nats, samples) = loss.hits.tokens.tolist(), loss.hits.sequences.tolist()
    assert (hit, tokens) == (2 * float(right.sum()), 2 * float(weights.sum()))
    assert (class_hit, samples) == (1.0, 2.0), "one class of two is right; weights of a half, twice"
    assert abs((nats + class_nats) / 2 - float(total)) < 1e-6
