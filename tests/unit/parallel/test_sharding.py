"""Slices of full tensors, and weights that no layout changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.sharding import (
    Init,
    ShardSpec,
    initialise,
    join_slices,
    mark,
    set_global_names,
    sharded_parameter,
    take_slice,
)
from megatron_lite.parallel.topology import Topology


def _context(size: int, rank: int = 0) -> ParallelContext:
    context = ParallelContext.single()
    context.topology, context.rank = Topology(tensor_parallel_size=size), rank
    return context


@given(
    size=st.sampled_from([1, 2, 3, 4, 8]),
    rows=st.integers(1, 6),
    other=st.integers(1, 4),
    dim=st.sampled_from([None, 0, 1]),
    missing=st.integers(0, 40),
)
def test_slices_join_to_the_full_tensor(size: int, rows: int, other: int, dim: int | None, missing: int):
    """Also where padding is longer than a slice, so that the last ranks hold nothing else."""
    padded = rows * size
    true = max(1, padded - missing)
    shape = {None: (true, other), 0: (true, other), 1: (other, true)}[dim]
    spec = ShardSpec(shape, dim, Init.zeros(), padded_size=None if dim is None else padded)
    full = torch.arange(1.0, 1.0 + true * other).view(shape)
    slices = [take_slice(full, spec, rank, size) for rank in range(size)]
    assert {tuple(part.shape) for part in slices} == {spec.local_shape(size)}
    assert torch.equal(join_slices(slices, spec), full)
    if dim is not None:
        assert torch.cat(slices, dim).narrow(dim, true, padded - true).count_nonzero() == 0


def test_a_dimension_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="not a multiple of 4"):
        sharded_parameter(ShardSpec((6, 2), 0, Init.zeros()), _context(4))


def test_a_tensor_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="expected a tensor of shape"):
        take_slice(torch.zeros(3, 2), ShardSpec((4, 2), 0, Init.zeros()), 0, 2)


def test_only_split_parameters_carry_deepspeeds_mark():
    split, replicated = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    mark(split, ShardSpec((4,), 0, Init.zeros()))
    mark(replicated, ShardSpec((2,), None, Init.zeros()))
    assert split.tensor_model_parallel
    assert not hasattr(replicated, "tensor_model_parallel")


class _Layer(nn.Module):
    def __init__(self, context: ParallelContext) -> None:
        super().__init__()
        self.matrix = sharded_parameter(ShardSpec((8, 1000), 0, Init.normal(0.5)), context)
        self.scale = sharded_parameter(ShardSpec((8,), None, Init.ones()), context)
        self.shift = sharded_parameter(ShardSpec((8,), 0, Init.zeros()), context)


def _initialised(prefix: str, seed: int, context: ParallelContext) -> _Layer:
    layer = _Layer(context)
    set_global_names(layer, prefix)
    initialise(layer, prefix, seed, context)
    return layer


def test_initial_weights_depend_on_name_and_seed_alone():
    full = _initialised("layers.0", 1, _context(1)).matrix
    slices = [_initialised("layers.0", 1, _context(4, rank)).matrix for rank in range(4)]
    assert torch.equal(torch.cat(slices), full)
    assert not torch.equal(full, _initialised("layers.1", 1, _context(1)).matrix)
    assert not torch.equal(full, _initialised("layers.0", 2, _context(1)).matrix)
    torch.manual_seed(99)  # the global generator plays no part, and is not touched
    before = torch.get_rng_state()
    assert torch.equal(full, _initialised("layers.0", 1, _context(1)).matrix)
    assert torch.equal(before, torch.get_rng_state())


def test_initial_weights_have_the_asked_distribution():
    layer = _initialised("layers.0", 1, _context(1))
    assert layer.matrix.mean().item() == pytest.approx(0.0, abs=0.02)
    assert layer.matrix.std().item() == pytest.approx(0.5, rel=0.03)
    assert (layer.scale == 1).all()
    assert (layer.shift == 0).all()


def test_names_are_global():
    assert _initialised("layers.3", 1, _context(2)).matrix.global_name == "layers.3.matrix"
