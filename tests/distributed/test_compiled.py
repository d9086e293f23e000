"""train.compile=blocks: one graph for each kind of block, without a break, with the results of eager blocks.

With the engine, compiled layouts are rows of test_equivalence.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from megatron_lite.config.schema import Architecture, Recompute
from megatron_lite.engine.compiler import require_compiler
from megatron_lite.errors import LaunchError, TrainingError
from megatron_lite.models.block import TransformerBlock
from megatron_lite.models.fields import Field
from megatron_lite.verify.equivalence import TOLERANCE
from tests.distributed.compiled_ranks import (
    Case,
    build,
    compiling,
    differences,
    reports,
    saved_shapes,
    train,
)
from tests.distributed.harness import run_ranks
from tests.tiny_models import BART, BERT, GPT2, LENGTHS, LLAMA, PAIR, ROBERTA, SEGMENTS, T5, T5_V1_1, TOKENS
from tests.unit.remedies import obeys

CASES = {
    "gpt2_prefix": Case(GPT2, (TOKENS, Field("prefix_lengths"))),
    "gpt2_selective": Case(GPT2, (TOKENS,), recompute=Recompute.selective),
    "gpt2_tp2": Case(GPT2, (TOKENS,), 2, recompute=Recompute.full, dropout=False),
    "gpt2_sp": Case(GPT2, (TOKENS,), 2, True),
    "llama_grouped": Case(replace(LLAMA, num_query_groups=2), (TOKENS,), recompute=Recompute.full),
    "llama_tp2": Case(LLAMA, (TOKENS,), 2, recompute=Recompute.selective),
    "llama_sp": Case(LLAMA, (TOKENS,), 2, True, recompute=Recompute.selective, dropout=False),
    "bert_tp2": Case(BERT, (TOKENS, SEGMENTS, LENGTHS), 2, recompute=Recompute.selective),
    "roberta_sp": Case(ROBERTA, (TOKENS, LENGTHS), 2, True, recompute=Recompute.full),
    "t5": Case(T5, (*PAIR, LENGTHS), recompute=Recompute.selective, dropout=False),
    "t5_v1_1_sp": Case(T5_V1_1, (*PAIR, LENGTHS), 2, True, recompute=Recompute.full),
    "bart_tp2": Case(BART, (*PAIR, LENGTHS), 2),
    "bart_sp": Case(BART, (*PAIR, LENGTHS), 2, True, recompute=Recompute.selective, dropout=False),
}
"""Pairs of family, tensor and sequence parallelism, recomputation and dropout."""
ON_ONE_RANK = [name for name, case in CASES.items() if case.tensor_parallel == 1]


def test_each_kind_of_block_is_one_graph_for_all_steps() -> None:
    (found,) = run_ranks(reports, 1, list(CASES.values()), timeout_seconds=600)
    for (name, case), report in zip(CASES.items(), found, strict=True):
        kinds = 2 if case.model.architecture is Architecture.encoder_decoder else 1
        assert (report.graphs, report.breaks) == (kinds, ()), name
        assert report.graphs_at_the_end == kinds, f"{name}: evaluation or generation compiled something"


@pytest.mark.parametrize("name", ON_ONE_RANK)
def test_a_compiled_block_has_the_results_of_an_eager_one(name: str) -> None:
    (difference,) = differences([CASES[name]], "aot_eager")
    assert difference <= TOLERANCE


def test_code_of_the_compiler_has_the_results_of_eager_blocks() -> None:
    try:
        require_compiler(torch.device("cpu"))
    except LaunchError as error:
        pytest.skip(str(error))
    (difference,) = differences([Case(LLAMA, (TOKENS,), recompute=Recompute.selective)], "inductor")
    assert difference <= TOLERANCE


def test_the_whole_sequence_is_not_kept_under_sequence_parallelism() -> None:
    """The backward pass gathers the inputs of column-parallel layers again: [b s, h] = [48, 32] must not be saved."""
    (shapes,) = run_ranks(saved_shapes, 1, CASES["llama_sp"])
    assert (2, 12, 32) in shapes
    assert not {(48, 32), (2, 24, 32), (4, 12, 32)} & shapes


@obeys("megatron_lite/models/compiled.py:_require_compiled")
def test_a_block_that_cannot_be_one_graph_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = TransformerBlock.forward

    def printing(block: TransformerBlock, *arguments: object) -> torch.Tensor:
        torch._dynamo.graph_break()
        return forward(block, *arguments)

    monkeypatch.setattr(TransformerBlock, "forward", printing)
    case = CASES["gpt2_selective"]
    with compiling("eager"):
        model, context = build(case, compiled_blocks=True)
        with pytest.raises(TrainingError, match=r"train.compile=blocks: .* layers\.0: .*; set train.compile=none"):
            train(model, context, case, 0)
    eager, context = build(case, compiled_blocks=False)  # the remedy
    assert train(eager, context, case, 0) > 0


def test_blocks_that_measure_are_graphs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """An auxiliary loss and a measurement inside of the graph: at most one more graph for the first micro-batch, one
    more for recomputation, and none for another gradient scale or step."""
    forward = TransformerBlock.forward

    def measuring(block: TransformerBlock, *arguments: object) -> torch.Tensor:
        x, auxiliary = forward(block, *arguments), block.context.auxiliary
        x = auxiliary.add_loss(x, "square", x.float().square().mean())
        auxiliary.measure("largest", x.abs().amax())
        return x

    def measured(*, compiled_blocks: bool) -> tuple[list[dict[str, float]], list[int]]:
        with compiling("aot_eager"):
            model, context = build(case, compiled_blocks=compiled_blocks)
            measures, graphs = [], []
            for step in range(3):
                context.auxiliary.begin_step(0.5 / (step + 1))
                train(model, context, case, step)
                measures.append(context.auxiliary.collect({"square": "mean", "largest": "max"}, 2))
                graphs.append(counters["stats"]["unique_graphs"])
            assert not counters["graph_break"]
        grads.append([weight.grad for weight in model.parameters()])
        return measures, graphs

    monkeypatch.setattr(TransformerBlock, "forward", measuring)
    case, grads = CASES["llama_grouped"], []
    (expected, _), (found, graphs) = measured(compiled_blocks=False), measured(compiled_blocks=True)
    for eager, traced in zip(expected, found, strict=True):
        assert traced == pytest.approx(eager, rel=1e-5)
    assert graphs[0] <= 3
    assert len(set(graphs)) == 1
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)
