"""Each sharded layer on 2 and 4 ranks against torch.nn on one rank: output, input gradient, parameter gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import megatron_lite.models.norms
from megatron_lite.config.derived import resolve_model
from megatron_lite.config.schema import ModelConfig, PositionEmbedding
from megatron_lite.models.initial import stack_init
from megatron_lite.models.norms import LayerNorm, RMSNorm
from megatron_lite.models.positions import PositionTable
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_logits,
)
from megatron_lite.parallel.sharding import Init, ShardSpec, set_global_names, take_slice
from megatron_lite.parallel.topology import Topology
from tests.distributed.harness import run_ranks
from tests.full_tensors import load_full_tensors

BATCH, SEQUENCE, IN, OUT, VOCAB, PADDED_VOCAB, HEAD = 3, 8, 12, 16, 13, 16, 3
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@dataclass(frozen=True)
class Passed:
    """Results of one rank."""

    output: Tensor
    input_grad: Tensor | None
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """How to build a layer on a rank and its unsharded twin, and how its activations are split."""

    build: Callable[[ParallelContext], nn.Module]
    twin: Callable[[], nn.Module]
    split_input: bool = False
    """Whether the input's channels are split over the ranks."""
    split_output: bool = False
    call: str = "x"
    """`x`, or `head` if the embedding is used as output head."""


class _Stacked(nn.Module):
    """Two matrices fused into one parameter, multiplied separately."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, OUT, IN))
        self.bias = nn.Parameter(torch.empty(2, OUT))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x @ w.T + b for w, b in zip(self.weight, self.bias, strict=True)], -2)  # [b, s, 2, o]


class _Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(SEQUENCE + 2, IN))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[: x.shape[1]]


class _HeadNorm(nn.Module):
    """A norm of queries: each tensor rank applies the same replicated weight to its own heads."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self._norm = norm.weight, [norm]

    def forward(self, x: Tensor) -> Tensor:
        return self._norm[0](x.unflatten(-1, (-1, HEAD))).flatten(-2)


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(VOCAB, IN))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def _column(bias: bool) -> Case:
    return Case(
        lambda context: ColumnParallelLinear(IN, OUT, context, bias=bias, init=Init.normal(1.0)),
        lambda: nn.Linear(IN, OUT, bias=bias),
        split_output=True,
    )


def _row(bias: bool) -> Case:
    return Case(
        lambda context: RowParallelLinear(IN, OUT, context, bias=bias, init=Init.normal(1.0)),
        lambda: nn.Linear(IN, OUT, bias=bias),
        split_input=True,
    )


def _embedding(context: ParallelContext) -> nn.Module:
    return VocabParallelEmbedding(VOCAB, IN, context, padded_vocab_size=PADDED_VOCAB, init=Init.normal(1.0))


def _position_layer(context: ParallelContext) -> nn.Module:
    learned = {"max_position_embeddings": SEQUENCE + 2, "position_embedding": PositionEmbedding.learned}
    model = resolve_model(ModelConfig(hidden_size=IN, num_attention_heads=1, **learned))
    return PositionTable(model, context, stack_init(model, 1))


CASES = {
    "column": _column(bias=False),
    "column_bias": _column(bias=True),
    "column_stacked": Case(
        lambda context: ColumnParallelLinear(IN, OUT, context, bias=True, init=Init.normal(1.0), stacked=2),
        _Stacked,
        split_output=True,
    ),
    "row": _row(bias=False),
    "row_bias": _row(bias=True),
    "embedding": Case(_embedding, lambda: nn.Embedding(VOCAB, IN)),
    "embedding_as_head": Case(_embedding, _Head, split_output=True, call="head"),
    "layernorm": Case(lambda context: LayerNorm(IN, 1e-5, context), lambda: nn.LayerNorm(IN, eps=1e-5)),
    "rmsnorm": Case(lambda context: RMSNorm(IN, 1e-5, context), lambda: nn.RMSNorm(IN, eps=1e-5)),
    "norm_of_heads": Case(
        lambda context: _HeadNorm(RMSNorm(HEAD, 1e-5, context, partial_gradient="heads")),
        lambda: _HeadNorm(nn.RMSNorm(HEAD, eps=1e-5)),
        split_input=True,
        split_output=True,
    ),
    "learned_positions": Case(_position_layer, _Positions),
}


def _input(case: Case, layer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if isinstance(layer, (nn.Embedding, VocabParallelEmbedding)) and case.call == "x":
        return torch.randint(VOCAB, (BATCH, SEQUENCE), generator=generator)
    return torch.randn(BATCH, SEQUENCE, IN, generator=generator)


def _weights(names_and_shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return {name: torch.randn(shape, generator=generator) for name, shape in sorted(names_and_shapes.items())}


def _output_gradient(output: Tensor) -> Tensor:
    return torch.randn(output.shape, generator=torch.Generator().manual_seed(8))


def _expected(case: Case) -> tuple[Passed, Tensor]:
    twin = case.twin()
    weights = _weights({name: tuple(parameter.shape) for name, parameter in twin.named_parameters()})
    twin.load_state_dict(weights)
    x = _input(case, twin)
    if x.is_floating_point():
        x.requires_grad_()
    output = twin(x)
    gradient = _output_gradient(output)
    output.backward(gradient)
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    return Passed(output.detach(), x.grad, gradients), gradient


def _on_rank(name: str, topology: Topology, sequence_parallel: bool, output_gradient: Tensor) -> Passed:
    case = CASES[name]
    context = ParallelContext.build(topology, device=torch.device("cpu"), sequence_parallel=sequence_parallel, seed=1)
    layer = case.build(context)
    set_global_names(layer, "layer")
    shapes = {key: parameter.shard_spec.full_shape for key, parameter in layer.named_parameters()}
    load_full_tensors(layer, {f"layer.{key}": value for key, value in _weights(shapes).items()}, context)
    x = _input(case, layer)
    if x.is_floating_point():
        x = _local(x, context, case.split_input).requires_grad_()
    output = layer(x, vocab_parallel_logits) if case.call == "head" else layer(x)
    output.backward(_local(_padded(output_gradient, name), context, case.split_output).flatten(2))
    gradients = {key: parameter.grad for key, parameter in layer.named_parameters()}
    return Passed(output.detach(), x.grad, gradients)


def _padded(gradient: Tensor, name: str) -> Tensor:
    """Append the zero gradient that the loss gives to padding columns of the vocabulary."""
    if name == "embedding_as_head":
        return nn.functional.pad(gradient, (0, PADDED_VOCAB - VOCAB))
    return gradient


def _local(full: Tensor, context: ParallelContext, split_channels: bool) -> Tensor:
    """This rank's part of an activation, split as the layer's contract says."""
    if split_channels:
        return full.chunk(context.tensor_size, -1)[context.tensor_rank].contiguous()
    if context.sequence_parallel:
        return full.chunk(context.tensor_size, 1)[context.tensor_rank].contiguous()
    return full.clone()


def _joined(parts: list[Tensor], like: Tensor, split_channels: bool, sequence_parallel: bool) -> Tensor:
    if split_channels:
        stacked = like.shape[2:-1]
        return torch.cat([part.view(*part.shape[:2], *stacked, -1) for part in parts], -1)[..., : like.shape[-1]]
    if sequence_parallel:
        return torch.cat(parts, 1)
    for part in parts[1:]:  # replicated: must be equal on all ranks
        torch.testing.assert_close(part, parts[0], rtol=0.0, atol=0.0)
    return parts[0]


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence_parallel"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_layer_matches_torch(name: str, size: int, sequence_parallel: bool):
    case = CASES[name]
    expected, output_gradient = _expected(case)
    topology = Topology(tensor_parallel_size=size)
    ranks = run_ranks(_on_rank, size, name, topology, sequence_parallel, output_gradient)

    output = _joined([rank.output for rank in ranks], expected.output, case.split_output, sequence_parallel)
    torch.testing.assert_close(output, expected.output, **TOLERANCE)
    if expected.input_grad is not None:
        input_grad = _joined(
            [rank.input_grad for rank in ranks], expected.input_grad, case.split_input, sequence_parallel
        )
        torch.testing.assert_close(input_grad, expected.input_grad, **TOLERANCE)
    specs = {key: parameter.shard_spec for key, parameter in case.build(_pretended(size)).named_parameters()}
    for key, gradient in expected.gradients.items():
        for index, rank in enumerate(ranks):
            local = take_slice(gradient, specs[key], index, size)
            torch.testing.assert_close(rank.gradients[key], local, **TOLERANCE)


def _on_rank_unsummed(*arguments: Any) -> Passed:
    with mock.patch.object(megatron_lite.models.norms, "sum_gradients", lambda context, *parameters: parameters):
        return _on_rank(*arguments)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence_parallel"])
def test_a_partial_gradient_that_is_not_summed_is_caught(sequence_parallel: bool) -> None:
    expected, output_gradient = _expected(CASES["norm_of_heads"])
    topology = Topology(tensor_parallel_size=2)
    for rank in run_ranks(_on_rank_unsummed, 2, "norm_of_heads", topology, sequence_parallel, output_gradient):
        difference = (rank.gradients["weight"] - expected.gradients["weight"]).norm()
        assert difference > 0.1 * expected.gradients["weight"].norm()


def test_a_split_parameter_has_no_partial_gradient() -> None:
    with pytest.raises(ValueError, match="has no partial gradient"):
        ShardSpec((8,), 0, Init.ones(), partial_gradient="heads")


def _pretended(size: int) -> ParallelContext:
    """A context for computing shapes only, without process groups."""
    context = ParallelContext.single()
    context.topology = Topology(tensor_parallel_size=size)
    return context
