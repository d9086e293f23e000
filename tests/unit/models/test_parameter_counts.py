"""What the planner counts is what the ranks hold: every family, on every stage of every pipeline, whole and split."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from megatron_lite.config.derived import all_layers, parameter_counts, resolve_model, stage_contents
from megatron_lite.config.schema import NormPlacement, Recompute
from megatron_lite.models.build import build_layers
from megatron_lite.models.flat import FlatModel
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.topology import Topology, even_cut, padded_vocab_size, stage_bounds
from tests.tiny_models import BART, BERT, MODELS, TinyModel

VOCAB_SIZE = 60
PRE_NORM = NormPlacement.pre
CASES = {
    **MODELS,
    "bert_pre_norm": replace(MODELS["bert"], model=replace(BERT, norm_placement=PRE_NORM, tie_embeddings=False)),
    "bart_pre_norm": replace(MODELS["bart"], model=replace(BART, norm_placement=PRE_NORM, head_bias=True)),
}


def built(tiny: TinyModel, cut: list[int], tensor: int) -> list[int]:
    """Parameters that the modules of each stage have on one rank, those of a tied module once."""
    context = ParallelContext.single()
    context.topology = Topology(tensor_parallel_size=tensor)
    specs = build_layers(
        resolve_model(tiny.model),
        context,
        vocab_size=VOCAB_SIZE,
        recompute=Recompute.none,
        inputs=tiny.inputs,
        next_sentence_head=tiny.next_sentence,
    )
    starts = [index for index, spec in enumerate(specs) if spec.stage_inputs is not None and index > 0]
    bounds = stage_bounds(starts, len(specs), cut)
    parts = [FlatModel(specs[start:stop]) for start, stop in pairwise(bounds)]
    return [sum(parameter.numel() for parameter in part.parameters()) for part in parts]


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_the_built_layers(name: str, tensor: int) -> None:
    tiny, model = CASES[name], resolve_model(CASES[name].model)
    padded = padded_vocab_size(VOCAB_SIZE, model.vocab_pad_multiple, tensor)
    counts = parameter_counts(model, padded, tensor, next_sentence=tiny.next_sentence)
    layers = all_layers(model)
    alone = [[0, layers], [layers, 0], [0, layers, 0]]  # the embedding, the head, both
    for cut in [*(even_cut(layers, stages) for stages in range(1, layers + 1)), *alone]:
        planned = [counts.stage(content) for content in stage_contents(model, cut)]
        assert planned == built(tiny, cut, tensor)
