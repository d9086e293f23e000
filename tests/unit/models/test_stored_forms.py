"""Our parameters in transformers' files: every element has one place, and comes back from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lite.config.derived import resolve_model
from megatron_lite.config.hf.headers import TensorEntry
from megatron_lite.config.schema import Activation, ModelConfig, Normalization, NormPlacement, Recompute
from megatron_lite.errors import CheckpointError
from megatron_lite.models.build import build_layers
from megatron_lite.models.flat import FlatModel
from megatron_lite.models.hf import NoCounterpart, find_name, locate, stored_form
from megatron_lite.models.shapes import parameter_shapes
from megatron_lite.models.stored import Shape, StoredForm
from megatron_lite.parallel.context import ParallelContext
from tests.stored_tensors import from_stored, to_stored
from tests.tiny_models import BART, BERT, GPT2, LLAMA, MODELS, ROBERTA, T5, TinyModel

VOCAB_SIZE = 61
CASES = {
    **MODELS,
    "gpt2_untied": TinyModel(replace(GPT2, tie_embeddings=False)),
    "llama_biases": TinyModel(replace(LLAMA, attention_bias=True, mlp_bias=True, tie_embeddings=True)),
    "bert_untied": replace(MODELS["bert"], model=replace(BERT, tie_embeddings=False)),
}


def shapes_of(tiny: TinyModel) -> dict[str, Shape]:
    """Of all our parameters."""
    specs = build_layers(
        resolve_model(tiny.model),
        ParallelContext.single(),
        vocab_size=VOCAB_SIZE,
        recompute=Recompute.none,
        inputs=tiny.inputs,
        next_sentence_head=tiny.next_sentence,
    )
    return {name: parameter.shard_spec.full_shape for name, parameter in FlatModel(specs).named_parameters()}


def case(name: str) -> tuple[StoredForm, dict[str, Shape]]:
    shapes = shapes_of(CASES[name])
    return stored_form(resolve_model(CASES[name].model), shapes), shapes


def numbered(shapes: dict[str, Shape]) -> dict[str, Tensor]:
    """Tensors in which every number occurs once, and none is 0."""
    tensors, first = {}, 1.0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        tensors[name] = torch.arange(first, first + size, dtype=torch.float64).view(shape)
        first += size
    return tensors


@pytest.mark.parametrize("name", CASES)
def test_every_element_has_one_place_and_comes_back(name: str) -> None:
    form, shapes = case(name)
    full = numbered(shapes)
    stored = to_stored(full, form)
    values = torch.cat([tensor.flatten() for tensor in stored.values()])
    assert torch.equal(values[values > 0].sort().values, torch.cat([tensor.flatten() for tensor in full.values()]))
    back = from_stored(stored, form, shapes)
    assert back.keys() == full.keys()
    assert all(torch.equal(back[name], full[name]) for name in full)


def test_a_lost_and_a_doubled_piece_are_seen() -> None:
    form, shapes = case("llama")
    full = numbered(shapes)
    lost = to_stored(full, replace(form, pieces=form.pieces[:-1]))
    assert sum(int((tensor > 0).sum()) for tensor in lost.values()) < sum(tensor.numel() for tensor in full.values())
    wrong = replace(form.pieces[3], start=form.pieces[4].start, target=form.pieces[4].target)
    doubled = to_stored(full, replace(form, pieces=(*form.pieces[:3], wrong, *form.pieces[4:])))
    assert not torch.equal(from_stored(doubled, form, shapes)[wrong.source], full[wrong.source])


@pytest.mark.parametrize(
    ("model", "setting"),
    [
        (replace(GPT2, normalization=Normalization.rmsnorm), "model.normalization=rmsnorm"),
        (replace(GPT2, activation=Activation.swiglu), "model.activation=swiglu"),
        (replace(GPT2, mlp_bias=False), "model.mlp_bias=false"),
        (replace(GPT2, head_size=16), "model.head_size=16"),
        (replace(GPT2, num_query_groups=2), "model.num_query_groups=2"),
        (replace(GPT2, position_offset=2), "model.position_offset=2"),
        (replace(LLAMA, attention_scale=False), "model.attention_scale=false"),
        (replace(LLAMA, num_attention_heads=3, head_size=16), "model.num_attention_heads=3"),
        (replace(BERT, norm_placement=NormPlacement.pre), "model.norm_placement=pre"),
        (replace(BERT, num_segments=0), "model.num_segments=0"),
        (replace(ROBERTA, activation=Activation.relu), "model.activation=relu"),
        (replace(T5, attention_scale=True), "model.attention_scale=true"),
        (replace(BART, tie_embeddings=False), "model.tie_embeddings=false"),
        (replace(BART, head_bias=True), "model.head_bias=true"),
    ],
)
def test_a_model_that_transformers_lacks_has_no_form(model: ModelConfig, setting: str) -> None:
    with pytest.raises(NoCounterpart, match=setting):
        stored_form(resolve_model(model), parameter_shapes(resolve_model(model), VOCAB_SIZE))


def test_roberta_has_no_next_sentence_head() -> None:
    with pytest.raises(NoCounterpart, match="next-sentence head"):
        stored_form(resolve_model(ROBERTA), shapes_of(TinyModel(ROBERTA, next_sentence=True)))


def test_tensors_are_found_in_files_of_other_classes() -> None:
    form, _ = case("gpt2")
    files = {
        name.removeprefix("transformer."): TensorEntry(Path("f"), name, "BF16", shape, (0, 0))
        for name, shape in form.shapes.items()
    }
    assert locate(form, files, "model.init_from=DIR").keys() == form.shapes.keys()
    files["wte.weight"] = replace(files["wte.weight"], shape=(VOCAB_SIZE, 16))
    files["h.0.ln_1.bias"] = replace(files["h.0.ln_1.bias"], dtype="I8")
    del files["ln_f.weight"]
    with pytest.raises(CheckpointError) as caught:
        locate(form, files, "model.init_from=DIR")
    assert str(caught.value) == (
        "model.init_from=DIR does not hold the weights of this model: wte.weight is [61, 16], and the model's is "
        "[61, 32]; h.0.ln_1.bias is of type I8, and weights are F32, BF16, F16, F64; transformer.ln_f.weight [32] is "
        "missing; give the folder of such a model, with the config.json that was saved with it"
    )


def test_what_transformers_wants_beyond_ours_may_be_missing() -> None:
    form, _ = case("bart")
    assert "final_logits_bias" in form.shapes
    files = {name: TensorEntry(Path("f"), name, "F32", shape, (0, 0)) for name, shape in form.shapes.items()}
    del files["final_logits_bias"]
    assert locate(form, files, "") == files


@pytest.mark.parametrize(
    ("name", "in_file"),
    [
        ("transformer.h.0.ln_1.weight", "h.0.ln_1.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.gamma"),
        ("bert.embeddings.LayerNorm.bias", "embeddings.LayerNorm.beta"),
        ("shared.weight", "encoder.embed_tokens.weight"),
        ("model.shared.weight", "decoder.embed_tokens.weight"),
        ("lm_head.weight", None),
    ],
)
def test_names_of_other_versions_are_found(name: str, in_file: str | None) -> None:
    others = {"something.else.weight", "h.0.ln_2.weight", *([in_file] if in_file else [])}
    assert find_name(name, others) == in_file
