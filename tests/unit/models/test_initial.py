"""Initialisation schemes, as what parameters are drawn with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_lite.config.derived import resolve_model
from megatron_lite.config.schema import Architecture, InitScheme, ModelConfig, Recompute
from megatron_lite.models.build import build_layers
from megatron_lite.models.flat import FlatModel
from megatron_lite.parallel.context import ParallelContext
from tests.tiny_models import BERT, PAIR, T5, T5_V1_1, TOKENS

WIDE = {"hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 8, "head_size": 64}


def _flat(model: ModelConfig) -> FlatModel:
    inputs = (TOKENS,) if model.architecture is Architecture.encoder else PAIR
    return FlatModel(
        build_layers(
            resolve_model(model), ParallelContext.single(), vocab_size=400, recompute=Recompute.none, inputs=inputs
        )
    )


def _weights(model: ModelConfig) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in _flat(model).named_parameters()}


def _std(tensor: torch.Tensor) -> object:
    return pytest.approx(tensor.std().item(), rel=0.03)


@pytest.mark.parametrize("groups", [8, 2])
def test_t5_draws_by_fan_in(groups: int):
    weights = _weights(replace(T5_V1_1, **WIDE, num_query_groups=groups))
    query, key, value = (
        weights["decoder.layers.1.attention.qkv.weight"].view(groups, -1, 64, 256).split([8 // groups, 1, 1], dim=1)
    )
    cross_key, cross_value = weights["decoder.layers.1.cross_attention.key_value.weight"]
    assert _std(weights["embedding.weight"][:400]) == 1.0
    for matrix in (query, weights["decoder.layers.1.cross_attention.query.weight"]):
        assert _std(matrix) == (256 * 64) ** -0.5
    for matrix in (key, value, cross_key, cross_value, *weights["encoder.layers.0.mlp.gate_up.weight"]):
        assert _std(matrix) == 256**-0.5
    assert _std(weights["encoder.layers.0.attention.projection.weight"]) == 512**-0.5
    assert _std(weights["encoder.layers.1.mlp.down.weight"]) == 512**-0.5
    assert _std(weights["head.weight"][:400]) == 256**-0.5


def test_a_t5_starts_near_the_uniform_loss():
    """The tied head's factor belongs to the word table's deviation of 1: without it logits would be h^0.5 as large."""
    flat = _flat(replace(T5, **WIDE))
    tokens = torch.randint(400, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert 0.5 < flat(tokens, tokens[:, :16])[..., :400].std() < 2.0


def test_plain_draws_all_matrices_alike():
    weights = _weights(replace(BERT, **WIDE, init_std=0.5))
    matrices = {name: weight for name, weight in weights.items() if weight.dim() > 1}
    matrices["embedding.weight"] = matrices["embedding.weight"][:400]
    assert len(matrices) > 10
    assert all(_std(weight) == 0.5 for weight in matrices.values() if weight.numel() > 2000)


def test_residual_projections_shrink_with_the_sums_of_their_stack():
    weights = _weights(replace(T5, **WIDE, init=InitScheme.normal, init_std=0.6))
    assert _std(weights["encoder.layers.0.mlp.down.weight"]) == 0.6 / 4**0.5  # two layers of two sums
    for part in ("attention.projection", "cross_attention.projection", "mlp.down"):
        assert _std(weights[f"decoder.layers.2.{part}.weight"]) == 0.6 / 9**0.5  # three layers of three sums
    assert _std(weights["encoder.layers.0.mlp.up.weight"]) == 0.6
