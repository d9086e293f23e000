"""What crosses a stage boundary comes out as it went in, in as few tensors as can be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_lite.models.activations import Activations, StageBoundary
from megatron_lite.models.fields import Field
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.topology import Topology

HIDDEN, BATCH = 4, 3
FIELDS = {
    "hidden": (Field("hidden", 6), torch.rand(BATCH, 6, HIDDEN)),
    "memory": (Field("memory", 8), torch.rand(BATCH, 8, HIDDEN)),
    "tokens": (Field("tokens", 6), torch.arange(BATCH * 6).view(BATCH, 6)),
    "decoder_tokens": (Field("decoder_tokens", 2), torch.arange(BATCH * 2).view(BATCH, 2)),
    "lengths": (Field("lengths"), torch.tensor([5, 6, 1])),
}


@pytest.mark.parametrize(
    ("names", "num_tensors"),
    [
        (["tokens"], 1),
        (["hidden"], 1),
        (["tokens", "lengths", "decoder_tokens"], 1),
        (["hidden", "memory"], 1),
        (["hidden", "lengths"], 2),
        (["lengths", "memory", "decoder_tokens", "hidden"], 2),
    ],
)
def test_round_trip(names: list[str], num_tensors: int) -> None:
    boundary = StageBoundary([FIELDS[name][0] for name in names], HIDDEN, ParallelContext.single())
    sent = boundary.pack(Activations(**{name: FIELDS[name][1] for name in names}))
    tensors = [sent] if isinstance(sent, torch.Tensor) else list(sent)
    assert len(tensors) == num_tensors
    assert [t.is_floating_point() for t in tensors] == sorted((t.is_floating_point() for t in tensors), reverse=True)
    received = boundary.unpack(sent)
    for name, (_, tensor) in FIELDS.items():
        found = getattr(received, name)
        assert found is None if name not in names else torch.equal(found, tensor)
    buffers = boundary.empty(BATCH, torch.float32, torch.device("cpu"))
    assert [(b.shape, b.dtype) for b in buffers] == [(t.shape, t.dtype) for t in tensors]


def test_one_backward_pass_reaches_both_hidden_states() -> None:
    hidden, memory = (torch.rand(BATCH, length, HIDDEN, requires_grad=True) for length in (6, 8))
    boundary = StageBoundary([Field("hidden", 6), Field("memory", 8)], HIDDEN, ParallelContext.single())
    sent = boundary.pack(Activations(hidden=hidden, memory=memory))
    assert isinstance(sent, torch.Tensor)
    sent.backward(torch.arange(sent.numel(), dtype=torch.float32).view_as(sent))
    assert torch.equal(torch.cat([hidden.grad, memory.grad], 1), torch.arange(float(sent.numel())).view_as(sent))


def test_slices_of_the_sequence() -> None:
    context = replace(ParallelContext.single(), topology=Topology(tensor_parallel_size=2), sequence_parallel=True)
    boundary = StageBoundary([Field("hidden", 6), Field("memory", 8), Field("decoder_tokens", 2)], HIDDEN, context)
    floats, integers = boundary.empty(BATCH, torch.bfloat16, torch.device("cpu"))
    assert floats.shape == (BATCH, 3 + 4, HIDDEN)
    assert integers.shape == (BATCH, 2), "tokens are not sliced"
    assert boundary.unpack((floats, integers)).memory.shape == (BATCH, 4, HIDDEN)


def test_missing_field_is_named() -> None:
    boundary = StageBoundary([Field("hidden", 6), Field("lengths")], HIDDEN, ParallelContext.single())
    with pytest.raises(AssertionError, match="takes lengths"):
        boundary.pack(Activations(hidden=FIELDS["hidden"][1]))
