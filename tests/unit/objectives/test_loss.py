"""The loss over tokens and classes, and the counts of right predictions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_lite.config.schema import OptimizerConfig
from megatron_lite.models.activations import Activations
from megatron_lite.objectives.loss import TokenLoss
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.layers import HeadWeights

VOCAB_SIZE, PADDED = 5, 8
CONTEXT = ParallelContext.single()


def _left(logits: torch.Tensor, classes: torch.Tensor | None = None) -> Activations:
    """What a model with these logits leaves: hidden states equal to them, and a head whose weight is the identity."""
    weights = HeadWeights(CONTEXT, torch.eye(PADDED))
    return Activations(hidden=logits, head=lambda hidden, use: use(hidden, weights), sequence_logits=classes)


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
    found = loss(_left(logits, classes), (labels, weights, class_labels, class_weights))
    gradients = torch.autograd.grad(found, (logits, classes))
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_z_loss_is_in_the_gradients_alone(chunk: int | None) -> None:
    """PaLM's weight x mean of log(Z)^2, held against torch's logsumexp; evaluation knows nothing of it."""
    logits, labels, weights, *_ = _case()
    logits.requires_grad_()
    plain = logits[..., :VOCAB_SIZE]
    per_token = F.cross_entropy(plain.transpose(1, 2), labels, reduction="none")
    z_loss = 0.3 * (plain.logsumexp(-1).square() * weights).sum()
    (expected,) = torch.autograd.grad((per_token * weights).sum() + z_loss, logits)
    context = ParallelContext.single()
    loss = TokenLoss(context, VOCAB_SIZE, OptimizerConfig(z_loss_weight=0.3), head_chunk=chunk)
    found = loss(_left(logits), (labels, weights))
    torch.testing.assert_close(found, (per_token * weights).sum())
    torch.testing.assert_close(torch.autograd.grad(found, logits)[0], expected)
    measured = context.auxiliary.collect({"z_loss": "mean"}, 2)["z_loss"]
    assert abs(measured - z_loss.item() / 2) < 1e-6
    context.auxiliary.begin_step(1.0)
    with loss.counting():
        loss(_left(logits.detach()), (labels, weights))
    assert context.auxiliary.collect({"z_loss": "mean"}, 1) == {"z_loss": 0.0}


def test_right_predictions_are_weighted_like_the_loss() -> None:
    logits, labels, weights, classes, class_labels, class_weights = _case()
    loss = TokenLoss(ParallelContext.single(), VOCAB_SIZE, head_chunk=4)
    with loss.counting() as counts:
        for _ in range(2):  # two micro-batches
            total = loss(_left(logits, classes), (labels, weights, class_labels, class_weights))
    right = (logits[..., :VOCAB_SIZE].argmax(-1) == labels) * weights
    assert 0 < right.sum() < weights.sum()
    (hit, nats, tokens), (class_hit, class_nats, samples) = counts.tokens.tolist(), counts.sequences.tolist()
    assert (hit, tokens) == (2 * float(right.sum()), 2 * float(weights.sum()))
    assert (class_hit, samples) == (1.0, 2.0), "one class of two is right; weights of a half, twice"
    assert abs((nats + class_nats) / 2 - float(total)) < 1e-6
