"""Adafactor: the published numbers, truly factored, and the same update under tensor parallelism."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from megatron_lite.optim.adafactor import Adafactor
from megatron_lite.parallel.sharding import Init, ShardSpec, join_slices
from tests.distributed.harness import run_ranks
from tests.unit.optim.adafactor_ranks import TENSORS, trained_slices

SHAPES = [(7, 5), (5,), (3, 4, 6)]


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def parameters_of(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(2)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_numbers_of_transformers() -> None:
    from transformers.optimization import Adafactor as Reference

    ours, theirs = parameters_of(SHAPES), parameters_of(SHAPES)
    run(Adafactor(ours, lr=0.02), ours, 6)
    run(
        Reference(theirs, lr=0.02, scale_parameter=True, relative_step=False, warmup_init=False, weight_decay=0.0),
        theirs,
        6,
    )
    for value, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_numbers_of_torch_with_weight_decay() -> None:
    ours, theirs = parameters_of(SHAPES), parameters_of(SHAPES)
    run(Adafactor(ours, lr=0.02, weight_decay=0.3), ours, 6)
    run(torch.optim.Adafactor(theirs, lr=0.02, weight_decay=0.3, eps=(1e-30, 1e-3)), theirs, 6)
    for value, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_state_is_factored() -> None:
    """A matrix of R x C keeps R + C numbers; a stack of them one pair each; a vector is kept whole."""
    parameters = parameters_of([(300, 200), (10,), (3, 40, 50)])
    optimizer = Adafactor(parameters, lr=0.01)
    run(optimizer, parameters, 2)
    sizes = [
        sum(value.numel() for value in optimizer.state[p].values() if isinstance(value, Tensor)) for p in parameters
    ]
    assert sizes == [500, 10, 3 * 90]


def test_resumes_from_its_state() -> None:
    straight = parameters_of(SHAPES)
    first = Adafactor(straight, lr=0.02)
    run(first, straight, 2)
    resumed = copy.deepcopy(straight)
    second = Adafactor(resumed, lr=0.02)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    run(first, straight, 2)
    run(second, resumed, 2)
    for parameter, other in zip(straight, resumed, strict=True):
        assert torch.equal(parameter, other)


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Tensor]:
    alone = [trained_slices(1)]
    return {name: joined(alone, name) for name in TENSORS}


def joined(slices: list[dict[str, Tensor]], name: str) -> Tensor:
    shape, dim, padded = TENSORS[name]
    return join_slices([part[name] for part in slices], ShardSpec(shape, dim, Init.zeros(), padded))


def test_two_tensor_parallel_ranks_equal_one(one_rank: dict[str, Tensor]) -> None:
    slices = run_ranks(trained_slices, 2, 2)
    for name, expected in one_rank.items():
        torch.testing.assert_close(
            joined(slices, name), expected, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
    for rank, part in enumerate(slices):
        true_rows = max(0, 9 - 6 * rank)
        assert not part["vocabulary"][true_rows:].any(), "padded rows stay zero"


def test_without_the_group_every_sharded_tensor_is_wrong(one_rank: dict[str, Tensor]) -> None:
    """What the test above would see if the all-reduces were missing."""
    slices = run_ranks(trained_slices, 2, 2, False)
    for name, expected in one_rank.items():
        error = (joined(slices, name) - expected).abs().max().item()
        if TENSORS[name][1] is None or name == "few":  # of `few`, rank 0 holds every true row
            assert error < 1e-6, name
        else:
            assert error > 1e-4, name


@pytest.mark.parametrize("shape", [(2, 3), (3,)])
def test_without_a_gradient_nothing_moves(shape: tuple[int, ...]) -> None:
    """epsilon1 keeps the second moment above 0."""
    weight = nn.Parameter(torch.ones(shape))
    optimizer = Adafactor([weight], lr=0.1)
    weight.grad = torch.zeros(shape)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(shape))


@pytest.mark.parametrize("shape", [(2, 3), (3,)])
def test_a_parameter_that_is_zero_moves_by_the_smallest_scale(shape: tuple[int, ...]) -> None:
    """epsilon2 = 1e-3 in place of its RMS (arXiv 1804.04235, section 8)."""
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = Adafactor([weight], lr=0.1)
    weight.grad = torch.full(shape, 5.0)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full(shape, -1e-4), rtol=1e-5, atol=0.0)
