"""Which ranks share a dropout mask, and recomputation under tensor parallelism."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_lite.config.derived import resolve_model
from megatron_lite.config.schema import Activation, ModelConfig, Normalization, Recompute
from megatron_lite.models.build import build_layers
from megatron_lite.models.dropout import activation_dropout, inner_dropout
from megatron_lite.models.fields import Field
from megatron_lite.models.flat import FlatModel
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.rng import DropoutKey
from megatron_lite.parallel.sharding import join_slices
from megatron_lite.parallel.topology import Topology
from tests.distributed.harness import run_ranks
from tests.mean_loss import mean_loss
from tests.tiny_models import GPT2

VOCAB_SIZE = 37
INPUTS = (Field("tokens", 16),)
KEY = DropoutKey("layers.0", 4)
MODEL = replace(
    GPT2,
    num_query_groups=2,
    normalization=Normalization.rmsnorm,
    activation=Activation.swiglu,
    embedding_dropout=0.2,
    hidden_dropout=0.1,
    ffn_dropout=0.2,
    final_dropout=0.1,
)


def _context(size: int, sequence_parallel: bool) -> ParallelContext:
    if size == 1:
        return ParallelContext.single(seed=5)
    topology = Topology(tensor_parallel_size=size)
    return ParallelContext.build(topology, device=torch.device("cpu"), sequence_parallel=sequence_parallel, seed=5)


def _step(model: ModelConfig, recompute: Recompute, size: int, sequence_parallel: bool) -> tuple[Tensor, dict]:
    """The loss, and the gradients with their specs."""
    context = _context(size, sequence_parallel)
    flat = FlatModel(
        build_layers(resolve_model(model), context, vocab_size=VOCAB_SIZE, recompute=recompute, inputs=INPUTS)
    )
    tokens = torch.randint(VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(0))
    context.rng.begin_step(first_sample=6, micro_batch_size=2)
    loss = mean_loss(flat, [tokens], tokens.roll(-1, 1), context, VOCAB_SIZE)
    loss.backward()
    return loss.detach(), {name: (p.grad, p.shard_spec) for name, p in flat.named_parameters()}


def _all_recomputations(model: ModelConfig, sequence_parallel: bool) -> list[tuple[Tensor, dict]]:
    return [_step(model, recompute, 2, sequence_parallel) for recompute in Recompute]


def _hidden_mask(sequence_parallel: bool) -> Tensor:
    return activation_dropout(torch.ones(2, 8, 16), 0.5, KEY, "mlp_output", _context(2, sequence_parallel))


def _inner_mask(size: int, sequence_parallel: bool) -> Tensor:
    """The dropout mask of this rank's share of 12 channels."""
    return inner_dropout(torch.ones(2, 8, 12 // size), 0.5, KEY, _context(size, sequence_parallel))


def _attention_output() -> Tensor:
    """Output of equal local heads on both ranks, so only the masks can make a difference."""
    model = replace(MODEL, attention_dropout=0.5)
    layers = build_layers(
        resolve_model(model), _context(2, False), vocab_size=VOCAB_SIZE, recompute=Recompute.none, inputs=INPUTS
    )
    attention = next(layer for layer in layers if layer.name == "layers.0").build().attention
    qkv = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    return attention._attend(qkv, KEY).detach()


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_what_is_kept_is_scaled_up_by_the_share_that_is_kept(probability: float):
    """Checked exactly, because the twin of the equivalence tests uses the same dropout and would not show an error."""
    ones, context = torch.ones(2, 8, 64), _context(1, False)
    for masked in (
        activation_dropout(ones, probability, KEY, "mlp_output", context),
        inner_dropout(ones, probability, KEY, context),
    ):
        assert masked[masked > 0].unique().tolist() == pytest.approx([1 / (1 - probability)])
        assert (masked == 0).float().mean() == pytest.approx(probability, abs=0.06)


def test_replicated_activations_share_their_masks():
    first, second = run_ranks(_hidden_mask, 2, False)
    assert torch.equal(first, second)
    assert 0.4 < (first == 0).float().mean() < 0.6


def test_slices_of_the_sequence_have_their_own_masks():
    first, second = run_ranks(_hidden_mask, 2, True)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_inner_channels_have_their_part_of_one_mask(size: int, sequence_parallel: bool):
    whole = _inner_mask(1, False)
    assert 0.4 < (whole == 0).float().mean() < 0.6
    assert torch.equal(torch.cat(run_ranks(_inner_mask, size, size, sequence_parallel), -1), whole)


def test_heads_have_their_own_masks():
    first, second = run_ranks(_attention_output, 2)
    assert not torch.equal(first, second)


def test_tensor_parallelism_does_not_change_the_masks_of_replicated_activations():
    """So loss and gradients equal those of one rank, even with dropout."""
    loss, expected = _step(MODEL, Recompute.none, 1, False)
    ranks = run_ranks(_step, 2, MODEL, Recompute.full, 2, False)
    for name, (gradient, _) in expected.items():
        joined = join_slices([gradients[name][0] for _, gradients in ranks], ranks[0][1][name][1])
        torch.testing.assert_close(joined, gradient[: joined.shape[0]], rtol=1e-5, atol=1e-6, msg=name)
    for rank_loss, _ in ranks:
        torch.testing.assert_close(rank_loss, loss, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_recomputation_draws_the_same_masks(sequence_parallel: bool):
    model = replace(MODEL, attention_dropout=0.3)
    for plain, *others in run_ranks(_all_recomputations, 2, model, sequence_parallel):
        for loss, gradients in others:
            assert torch.equal(loss, plain[0])
            for name, (gradient, _) in plain[1].items():
                assert torch.equal(gradients[name][0], gradient), name
