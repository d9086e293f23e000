"""What the ranks of tests/distributed/test_compiled.py run: steps of compiled models, and what the compiler reports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_lite.config.derived import resolve_model
from megatron_lite.config.schema import ModelConfig, Recompute
from megatron_lite.models import compiled
from megatron_lite.models.build import build_layers
from megatron_lite.models.fields import Field
from megatron_lite.models.flat import FlatModel
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.topology import Topology
from tests.tiny_models import DECODER_LENGTH, LENGTH

VOCAB_SIZE = 60
DROPOUT = {"attention_dropout": 0.3, "hidden_dropout": 0.1, "ffn_dropout": 0.2}


@dataclass(frozen=True)
class Case:
    model: ModelConfig
    inputs: tuple[Field, ...]
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = Recompute.none
    dropout: bool = True


@dataclass(frozen=True)
class Report:
    """What torch.compile counted."""

    graphs: int
    """After two steps of two micro-batches."""
    graphs_at_the_end: int
    """After an evaluation, generation of other lengths, and one more step."""
    breaks: tuple[str, ...]


def reports(cases: Sequence[Case]) -> list[Report]:
    """Without communication: torch's `fake` process group of two ranks, whose collectives do nothing."""
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    return [_report(case) for case in cases]


def _report(case: Case) -> Report:
    with compiling("eager"):
        model, context = build(case, compiled_blocks=True)
        for step in range(2):
            train(model, context, case, step)
        graphs = counters["stats"]["unique_graphs"]
        model.eval()
        with torch.no_grad():
            for length in range(2, 2 * 12, 2):  # more lengths than torch.compile makes graphs of one function
                model(*arguments(case, length))
        train(model, context, case, 2)
        return Report(graphs, counters["stats"]["unique_graphs"], tuple(counters["graph_break"]))


@contextmanager
def compiling(backend: str) -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with mock.patch.object(compiled, "BACKEND", backend):
        yield
    torch._dynamo.reset()


def build(case: Case, *, compiled_blocks: bool) -> tuple[FlatModel, ParallelContext]:
    context = ParallelContext.single(seed=1)
    if case.tensor_parallel > 1:
        topology, device = Topology(tensor_parallel_size=case.tensor_parallel), torch.device("cpu")
        context = ParallelContext.build(topology, device=device, sequence_parallel=case.sequence_parallel, seed=1)
    layers = build_layers(
        resolve_model(replace(case.model, **(DROPOUT if case.dropout else {}))),
        context,
        vocab_size=VOCAB_SIZE,
        recompute=case.recompute,
        inputs=case.inputs,
        compiled_blocks=compiled_blocks,
    )
    return FlatModel(layers), context


def train(model: FlatModel, context: ParallelContext, case: Case, step: int) -> float:
    """Accumulates the gradients of two micro-batches; returns the sum of their losses."""
    model.train()
    context.rng.begin_step(first_sample=4 * step, micro_batch_size=2)
    total = 0.0
    for _ in range(2):
        context.auxiliary.record(is_forward=True)
        loss = model(*arguments(case)).float().square().mean()
        context.auxiliary.record(is_forward=False)
        loss.backward()
        total += loss.item()
    return total


def arguments(case: Case, length: int = LENGTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def ids(size: int) -> Tensor:
        return torch.randint(2, (2, size), generator=generator)

    made = {
        "tokens": ids(length),
        "segments": ids(length),
        "decoder_tokens": ids(min(length, DECODER_LENGTH)),
        "lengths": torch.tensor([max(1, length - 7), length]),
        "prefix_lengths": torch.tensor([min(5, length), 0]),
    }
    return [made[field.name] for field in case.inputs]


def saved_shapes(case: Case) -> set[tuple[int, ...]]:
    """Shapes of what a forward pass keeps for the backward pass, besides weights, where the compiler decides that."""
    dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    shapes: set[tuple[int, ...]] = set()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            shapes.add(tuple(tensor.shape))
        return tensor

    with compiling("aot_eager_decomp_partition"):
        model, context = build(case, compiled_blocks=True)
        weights = {weight.data_ptr() for weight in model.parameters()}
        context.rng.begin_step(first_sample=0, micro_batch_size=2)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(*arguments(case))
    return shapes


def differences(cases: Sequence[Case], backend: str) -> list[float]:
    """Largest relative difference of the loss and of any parameter's gradient, compiled and eager."""
    found = []
    for case in cases:
        results = []
        for compiled_blocks in (False, True):
            with compiling(backend):
                model, context = build(case, compiled_blocks=compiled_blocks)
                losses = [train(model, context, case, step) for step in range(2)]
                results.append((losses, {name: weight.grad for name, weight in model.named_parameters()}))
        (losses, eager), (other_losses, other) = results
        assert eager.keys() == other.keys()
        of_losses = [abs(one - two) / one for one, two in zip(losses, other_losses, strict=True)]
        of_gradients = [
            float((other[name] - grad).norm() / grad.norm().clamp(min=1e-12)) for name, grad in eager.items()
        ]
        found.append(max(*of_losses, *of_gradients))
    return found
