"""The layer list: names, shapes, tying, recomputation, dropout, precision, on one rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_lite.config.derived import resolve_model
from megatron_lite.config.schema import ModelConfig, PositionEmbedding, Recompute
from megatron_lite.models.build import build_layers
from megatron_lite.models.fields import Field
from megatron_lite.models.flat import FlatModel
from megatron_lite.models.positions import RotaryTable, rotate
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.topology import Topology
from tests import tiny_models
from tests.mean_loss import mean_loss

VOCAB_SIZE = 60
INPUTS = (Field("tokens", 16),)
GPT2 = replace(tiny_models.GPT2, max_position_embeddings=16, vocab_pad_multiple=32)
LLAMA = replace(tiny_models.LLAMA, num_query_groups=2, max_position_embeddings=16, vocab_pad_multiple=32)
DROPOUT = {
    "embedding_dropout": 0.2,
    "attention_dropout": 0.3,
    "hidden_dropout": 0.1,
    "ffn_dropout": 0.2,
    "final_dropout": 0.1,
}


def _model(
    model: ModelConfig, recompute: Recompute = Recompute.none, context: ParallelContext | None = None
) -> tuple[FlatModel, ParallelContext]:
    context = context or ParallelContext.single()
    return FlatModel(
        build_layers(resolve_model(model), context, vocab_size=VOCAB_SIZE, recompute=recompute, inputs=INPUTS)
    ), context


def _tokens() -> Tensor:
    return torch.randint(VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(0))


def _step(flat: FlatModel, context: ParallelContext, first_sample: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one micro-batch."""
    flat.zero_grad()
    context.rng.begin_step(first_sample, 2)
    loss = mean_loss(flat, [_tokens()], _tokens().roll(-1, 1), context, VOCAB_SIZE)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in flat.named_parameters()}


def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in _model(model)[0].named_parameters()}


def test_parameters_of_gpt2():
    shapes = _shapes(replace(GPT2, num_layers=1))
    assert shapes == {
        "embedding.weight": (64, 32),
        "position_embedding.weight": (16, 32),
        "layers.0.attention_norm.weight": (32,),
        "layers.0.attention_norm.bias": (32,),
        "layers.0.attention.qkv.weight": (96, 32),
        "layers.0.attention.qkv.bias": (96,),
        "layers.0.attention.projection.weight": (32, 32),
        "layers.0.attention.projection.bias": (32,),
        "layers.0.mlp_norm.weight": (32,),
        "layers.0.mlp_norm.bias": (32,),
        "layers.0.mlp.up.weight": (128, 32),
        "layers.0.mlp.up.bias": (128,),
        "layers.0.mlp.down.weight": (32, 128),
        "layers.0.mlp.down.bias": (32,),
        "final_norm.weight": (32,),
        "final_norm.bias": (32,),
    }


def test_parameters_of_llama():
    shapes = _shapes(replace(LLAMA, num_layers=1))
    assert shapes == {
        "embedding.weight": (64, 32),
        "layers.0.attention_norm.weight": (32,),
        "layers.0.attention.qkv.weight": (64, 32),  # 2 groups of (2 queries + key + value) x 8
        "layers.0.attention.projection.weight": (32, 32),
        "layers.0.mlp_norm.weight": (32,),
        "layers.0.mlp.gate_up.weight": (2, 128, 32),
        "layers.0.mlp.down.weight": (32, 128),
        "final_norm.weight": (32,),
        "head.weight": (64, 32),
    }


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_global_names_are_the_names_in_the_flat_model(model: ModelConfig):
    flat, _ = _model(model)
    assert all(parameter.global_name == name for name, parameter in flat.named_parameters())


def test_head_size_and_multi_query_change_the_fused_projection():
    shapes = _shapes(replace(LLAMA, head_size=4, num_query_groups=1))
    assert shapes["layers.0.attention.qkv.weight"] == ((4 + 2) * 4, 32)
    assert shapes["layers.0.attention.projection.weight"] == (32, 16)


def test_a_tied_head_shares_the_first_layers_module():
    tied = build_layers(
        resolve_model(GPT2), ParallelContext.single(), vocab_size=VOCAB_SIZE, recompute=Recompute.none, inputs=INPUTS
    )
    assert tied[0].tied == tied[-1].tied == "embedding"
    assert tied[-1].name == "head"
    untied = build_layers(
        resolve_model(LLAMA), ParallelContext.single(), vocab_size=VOCAB_SIZE, recompute=Recompute.none, inputs=INPUTS
    )
    assert all(spec.tied is None for spec in untied)


def test_positions_and_dropout_are_entries_only_where_they_do_something():
    names = [
        spec.name
        for spec in build_layers(
            resolve_model(LLAMA), ParallelContext.single(), vocab_size=9, recompute=Recompute.none, inputs=INPUTS
        )
    ]
    assert names == ["embedding", "layers.0", "layers.1", "final_norm", "head"]
    dropping = replace(LLAMA, embedding_dropout=0.1)
    layers = build_layers(
        resolve_model(dropping), ParallelContext.single(), vocab_size=9, recompute=Recompute.none, inputs=INPUTS
    )
    assert [layer.name for layer in layers][:3] == ["embedding", "embedding_dropout", "layers.0"]
    layers = build_layers(
        resolve_model(replace(dropping, position_embedding=PositionEmbedding.learned)),
        ParallelContext.single(),
        vocab_size=9,
        recompute=Recompute.none,
        inputs=INPUTS,
    )
    assert [layer.name for layer in layers][:3] == ["embedding", "position_embedding", "embedding_dropout"]


def test_initial_weights_follow_the_configuration():
    flat, _ = _model(replace(GPT2, hidden_size=128, init_std=0.5))
    state = dict(flat.named_parameters())
    assert state["layers.0.mlp.up.weight"].std().item() == pytest.approx(0.5, rel=0.02)
    assert state["layers.1.mlp.down.weight"].std().item() == pytest.approx(0.25, rel=0.02)  # / sqrt(2 x 2 layers)
    assert state["layers.0.attention.projection.weight"].std().item() == pytest.approx(0.25, rel=0.02)
    assert not torch.equal(state["layers.0.mlp.up.weight"], state["layers.1.mlp.up.weight"])
    assert state["embedding.weight"][VOCAB_SIZE:].count_nonzero() == 0
    assert (state["final_norm.weight"] == 1).all()
    assert all((parameter == 0).all() for name, parameter in state.items() if name.endswith("bias"))


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("size", [2, 4])
def test_initial_weights_do_not_depend_on_the_layout(model: ModelConfig, size: int):
    if model.num_query_groups is not None:
        size = min(size, model.num_query_groups)
    model = replace(model, vocab_pad_multiple=1)
    full = dict(_model(model)[0].named_parameters())
    ranks = []
    for rank in range(size):
        context = ParallelContext.single()
        context.topology, context.rank = Topology(tensor_parallel_size=size), rank
        ranks.append(dict(_model(model, context=context)[0].named_parameters()))
    for name, parameter in full.items():
        dim = parameter.shard_spec.dim
        slices = [rank[name] for rank in ranks]
        joined = slices[0] if dim is None else torch.cat(slices, dim)
        assert torch.equal(joined, parameter), name


@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
def test_recomputation_with_dropout_changes_nothing(model: ModelConfig, recompute: Recompute):
    dropping = replace(model, **DROPOUT)
    loss, gradients = _step(*_model(dropping))
    again_loss, again = _step(*_model(dropping, recompute))
    assert torch.equal(loss, again_loss)
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)
    other_loss, _ = _step(*_model(dropping), first_sample=2)
    assert not torch.equal(loss, other_loss)


@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
def test_recomputation_stores_less(recompute: Recompute):
    def stored_bytes(which: Recompute) -> int:
        flat, _ = _model(LLAMA, which)
        seen: dict[int, int] = {}
        parameters = {parameter.data_ptr() for parameter in flat.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            flat(_tokens())
        return sum(seen.values())

    assert stored_bytes(recompute) < stored_bytes(Recompute.none)


@pytest.mark.parametrize("kind", DROPOUT)
def test_each_dropout_acts_in_training_and_not_in_evaluation(kind: str):
    plain = _model(GPT2)[0](_tokens())
    flat, context = _model(replace(GPT2, **{kind: 0.5}))
    assert not torch.equal(flat(_tokens()), plain)
    flat.eval()
    forwards = dict(context.rng._forwards)
    assert torch.equal(flat(_tokens()), plain)
    assert dict(context.rng._forwards) == forwards  # no key is taken


def test_tokens_do_not_see_the_future():
    for model in (GPT2, LLAMA):
        flat, _ = _model(model)
        tokens = _tokens()
        changed = tokens.clone()
        changed[:, 9:] = (changed[:, 9:] + 1) % VOCAB_SIZE
        with torch.no_grad():
            before, after = flat(tokens), flat(changed)
        torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0.0, atol=1e-6)
        assert (before[:, 9:] - after[:, 9:]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_low_precision_follows_fp32(model: ModelConfig, dtype: torch.dtype):
    flat, context = _model(model)
    loss, gradients = _step(flat, context)
    low_loss, low = _step(flat.to(dtype), context)
    assert low_loss.dtype is torch.float32
    torch.testing.assert_close(low_loss, loss, rtol=2e-3, atol=0.0)
    for name, gradient in gradients.items():
        assert low[name].dtype is dtype
        assert (low[name].float() - gradient).norm() <= 0.05 * gradient.norm(), name


def test_a_rotation_keeps_lengths_and_depends_on_distance_alone():
    table = RotaryTable(8, 100.0)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    turned_query, turned_key = (rotate(x.expand(1, 12, 1, 1, 8), *table(12, x.device))[..., 0, :] for x in (query, key))
    torch.testing.assert_close(turned_query.norm(dim=-1), query.norm(dim=-1).expand(1, 12, 1))
    scores = (turned_query[0, :, 0] @ turned_key[0, :, 0].T).diagonal(offset=3)
    torch.testing.assert_close(scores, scores[:1].expand_as(scores))


def test_angles_stay_in_fp32_when_the_model_does_not():
    flat, _ = _model(LLAMA)
    flat.bfloat16()
    flat(_tokens())
    cos, sin = RotaryTable(8, 1e4)(16, torch.device("cpu"))
    assert cos.dtype is sin.dtype is torch.float32
    assert not dict(flat.named_buffers())
