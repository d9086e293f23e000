"""Our models against transformers' with equal weights: logits and every gradient, on one rank and on two ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.config.schema import Recompute
from megatron_lite.models.activations import Activations
from megatron_lite.models.flat import outputs_of
from megatron_lite.objectives.loss import TokenLoss
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.sharding import take_slice
from megatron_lite.parallel.topology import Topology
from tests.distributed.harness import run_ranks
from tests.distributed.reference_models import CASES, VOCAB_SIZE, Case, Expected, batch_of, expected
from tests.full_tensors import load_full_tensors
from tests.tiny_models import MODELS

TOLERANCE = 1e-5  # largest difference in fp32: absolute for logits, relative to the largest entry for gradients
TENSOR_PARALLEL_CASES = [
    *(f"{name}_padded" if f"{name}_padded" in CASES else name for name, tiny in MODELS.items() if not tiny.layers_of),
    "gpt2_untied",
    "llama_multi_head",
    "llama_biases",
]
HIDDEN = {"embedding_dropout": 0.1, "hidden_dropout": 0.1}  # transformers has one rate for both
DROPPING_CASES = {
    "gpt2": {"embedding_dropout": 0.2, "hidden_dropout": 0.1, "attention_dropout": 0.3},
    "bert_padded": HIDDEN | {"attention_dropout": 0.2},
    "roberta": HIDDEN | {"attention_dropout": 0.2},
    "t5": HIDDEN | {"attention_dropout": 0.1, "ffn_dropout": 0.1, "final_dropout": 0.1},
    "t5_v1_1_padded": HIDDEN | {"attention_dropout": 0.1, "ffn_dropout": 0.1, "final_dropout": 0.1},
    "bart_padded": HIDDEN | {"attention_dropout": 0.2, "ffn_dropout": 0.3},
}


class Found(NamedTuple):
    """This rank's slices of the logits and of the gradients."""

    logits: Tensor
    sequence_logits: Tensor | None
    gradients: dict[str, Tensor]


@cache
def _theirs(name: str) -> Expected:
    return expected(CASES[name])


def _ours(
    case: Case, weights: dict[str, Tensor], context: ParallelContext, recompute: Recompute = Recompute.none
) -> Found:
    flat = case.flat(context, recompute)
    load_full_tensors(flat, weights, context)
    batch = batch_of(case)
    out, loss = flat(
        *(batch[field.name] for field in case.inputs), end=lambda x: (outputs_of(x), _loss(x, batch, context))
    )
    logits, sequence_logits = out if case.next_sentence else (out, None)
    kept = logits.detach()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in flat.named_parameters()}
    return Found(kept, None if sequence_logits is None else sequence_logits.detach(), gradients)


def _loss(x: Activations, batch: dict[str, Tensor], context: ParallelContext) -> Tensor:
    targets = [batch["labels"], batch["loss_weights"] / batch["loss_weights"].sum()]
    if x.sequence_logits is not None:
        classes = batch["sequence_labels"]
        targets += [classes, torch.full(classes.shape, 1.0 / len(classes))]
    return TokenLoss(context, VOCAB_SIZE)(x, tuple(targets))


def _on_rank(name: str, weights: dict[str, Tensor], topology: Topology, sequence_parallel: bool) -> Found:
    context = ParallelContext.build(topology, device=torch.device("cpu"), sequence_parallel=sequence_parallel, seed=1)
    return _ours(CASES[name], weights, context)


@pytest.mark.parametrize("recompute", Recompute)
@pytest.mark.parametrize("name", CASES)
def test_one_rank_matches_transformers(name: str, recompute: Recompute):
    case = CASES[name]
    theirs = _theirs(name)
    ours = _ours(case, theirs.weights, ParallelContext.single(), recompute)
    _compare_logits(case, ours.logits, theirs.logits)
    if theirs.sequence_logits is not None:
        _compare(ours.sequence_logits, theirs.sequence_logits)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for parameter, gradient in theirs.gradients.items():
        _compare(ours.gradients[parameter][: gradient.shape[0]], gradient, gradient.abs().max().item())


@pytest.mark.parametrize("name", DROPPING_CASES)
def test_dropout_stands_where_transformers_has_it(name: str, monkeypatch: pytest.MonkeyPatch):
    """Dropout is replaced by a constant factor, so that a missing or additional dropout changes the result."""
    attention = F.scaled_dot_product_attention

    def shrunk_attention(*args: Tensor, dropout_p: float = 0.0, **settings: Any) -> Tensor:
        return attention(*args, **settings) * (1 - dropout_p)

    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, inplace=False: x * (1 - p) if training else x)
    monkeypatch.setattr(F, "scaled_dot_product_attention", shrunk_attention)
    case = CASES[name]
    case = replace(case, model=replace(case.model, **DROPPING_CASES[name]))
    theirs = expected(case)
    ours = _ours(case, theirs.weights, ParallelContext.single())
    _compare_logits(case, ours.logits, theirs.logits)
    without = _theirs(name).logits
    assert (theirs.logits - without).abs().max() > 100 * TOLERANCE, "nothing was dropped"


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", TENSOR_PARALLEL_CASES)
def test_two_tensor_parallel_ranks_match_transformers(name: str, sequence_parallel: bool):
    case = CASES[name]
    theirs = _theirs(name)
    ranks = run_ranks(_on_rank, 2, name, theirs.weights, Topology(tensor_parallel_size=2), sequence_parallel)
    _compare_logits(case, torch.cat([rank.logits for rank in ranks], -1), theirs.logits)
    context = replace(ParallelContext.single(), topology=Topology(tensor_parallel_size=2))
    specs = {name: parameter.shard_spec for name, parameter in case.flat(context).named_parameters()}
    for rank, found in enumerate(ranks):
        if theirs.sequence_logits is not None:
            _compare(found.sequence_logits, theirs.sequence_logits)
        for parameter, gradient in theirs.gradients.items():
            own = take_slice(gradient, specs[parameter], rank, 2)
            _compare(found.gradients[parameter], own, gradient.abs().max().item())


def _compare_logits(case: Case, ours: Tensor, theirs: Tensor) -> None:
    """Compare logits at positions whose predictions count; padded positions may have any value."""
    counts = batch_of(case)["loss_weights"] > 0
    _compare(ours[..., :VOCAB_SIZE][counts], theirs[counts])


def _compare(ours: Tensor, theirs: Tensor, unit: float = 1.0) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=TOLERANCE * unit)
