"""config.json in both directions: what we write is read as what it was, and what we do not compute is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from megatron_lite.config.derived import resolve_model
from megatron_lite.config.hf import NoCounterpart, generation_config, hf_config, settings_of
from megatron_lite.config.hf.families import DECISIVE, counterpart, is_read, model_types
from megatron_lite.config.preset_folders import SHIPPED, PresetFolders
from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.config.schema import Activation, Architecture, ModelConfig
from megatron_lite.errors import ConfigError
from megatron_lite.models.hf import stored_form
from megatron_lite.models.shapes import parameter_shapes
from tests.tiny_models import BART, BERT, GPT2, LLAMA, ROBERTA, T5, T5_V1_1
from tests.unit.config.hf_folders import Ids, tensor_shapes

SCRIPTS = {
    Architecture.decoder: "pretrain_gpt",
    Architecture.encoder: "pretrain_bert",
    Architecture.encoder_decoder: "pretrain_t5",
}
VARIANTS = {
    "gpt2_untied": replace(GPT2, tie_embeddings=False, attention_scale=False, ffn_hidden_size=80),
    "gpt2_relu": replace(GPT2, activation=Activation.relu),
    "llama_biases": replace(LLAMA, attention_bias=True, mlp_bias=True, tie_embeddings=True, rotary_base=5e5),
    "llama_geglu": replace(LLAMA, activation=Activation.geglu, head_size=16, num_query_groups=2),
    "bert": replace(BERT, tie_embeddings=False, num_segments=3, activation=Activation.gelu_tanh),
    "roberta": replace(ROBERTA, position_offset=2, num_segments=1, norm_epsilon=1e-6),
    "t5": replace(T5, num_decoder_layers=1, activation=Activation.gelu),
    "t5_v1_1": T5_V1_1,
    "t5_tied_unscaled": replace(T5, scale_tied_head=False, activation=Activation.swiglu),
    "bart": replace(BART, ffn_hidden_size=48, activation=Activation.relu),
}


def preset(name: str) -> ModelConfig:
    loaded = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(SHIPPED / "model" / f"{name}.yaml"))
    model = OmegaConf.to_object(loaded)
    assert isinstance(model, ModelConfig)
    return model


_WITHOUT_HEAD = tuple(tensor_shapes(T5, 777))
_WITH_HEAD = (*_WITHOUT_HEAD, "lm_head.weight")
PRESETS = PresetFolders().groups()["model"]


def written(model: ModelConfig, **more: Any) -> dict[str, Any]:
    """As it is after it has been a file."""
    config: dict[str, Any] = json.loads(
        json.dumps(hf_config(resolve_model(model), vocab_size=777, tokens=Ids(), **more))
    )
    return config


def decisive(model: ModelConfig) -> dict[str, Any]:
    return {name: getattr(resolve_model(model), name) for name in DECISIVE if name != "vocab_size"}


@pytest.mark.parametrize("name", [*PRESETS, *VARIANTS])
def test_what_is_written_is_read_as_what_it_was(name: str) -> None:
    model = VARIANTS.get(name) or preset(name)
    described = settings_of(written(model))
    assert described.family.script == SCRIPTS[model.architecture]
    assert described.settings["vocab_size"] == 777
    read = replace(ModelConfig(), **described.settings)
    assert decisive(read) == decisive(model)
    assert read.hidden_dropout == model.hidden_dropout or described.family.model_type == "llama"


def test_what_transformers_lacks_says_why() -> None:
    with pytest.raises(NoCounterpart, match=r"false for model\.attention_scale=true"):
        written(replace(preset("t5_tiny"), attention_scale=True))


def test_the_kind_of_encoder_follows_its_heads() -> None:
    assert written(BERT, next_sentence=True)["architectures"] == ["BertForPreTraining"]
    assert written(BERT)["architectures"] == ["BertForMaskedLM"]
    with pytest.raises(NoCounterpart, match=r"padding token \+ 1, which is 1 here, for model\.position_offset=5"):
        written(replace(ROBERTA, position_offset=5))


def test_tokens_that_begin_and_end() -> None:
    assert generation_config(written(GPT2)) == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    assert generation_config(written(T5)) == {"eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 1}
    assert generation_config(written(BART))["decoder_start_token_id"] == 3
    assert generation_config(written(BERT)) is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"model_type": "lama"},
            f"model_type=lama is not supported; supported: {', '.join(model_types())}; give",
        ),
        ({"hidden_act": "relu"}, "hidden_act=relu is not supported; supported: silu"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type=linear is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_parameters.rope_type=llama3"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"sliding_window": 4096}, "sliding_window=4096 is not supported; supported: null"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers=2 is not supported; supported: an integer"),
        ({"attention_bias": 1}, "attention_bias=1 is not supported; supported: true or false"),
    ],
)
def test_what_is_not_computed_here_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem.replace("(", r"\(")):
        settings_of(written(LLAMA) | changes)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(written(BART) | {"scale_embedding": True, "decoder_ffn_dim": 7, "activation_function": "tanh"})
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("key", ["rope_theta", "rope_parameters"])
def test_the_rotary_base_has_an_old_and_a_new_key(key: str) -> None:
    config = written(replace(LLAMA, rotary_base=500.0))
    config.pop(key)
    assert settings_of(config).settings["rotary_base"] == 500.0


def test_the_head_of_t5_after_transformers_5_has_saved_it() -> None:
    """It writes that embeddings are tied, whatever they are; the tensors tell."""
    config = written(T5_V1_1) | {"tie_word_embeddings": True}
    assert not settings_of(config, names=_WITH_HEAD).settings["tie_embeddings"]
    assert settings_of(config, names=_WITHOUT_HEAD).settings["tie_embeddings"]
    both = settings_of(written(T5), names=_WITH_HEAD).settings  # v1.0's files may hold the tied head, too
    assert (both["tie_embeddings"], both["scale_tied_head"]) == (True, True)


FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "bert": BERT, "roberta": ROBERTA, "t5": T5, "t5_v1_1": T5_V1_1, "bart": BART}
NUMBERS = {
    "num_layers": (1, 2),
    "num_decoder_layers": (None, 1),
    "hidden_size": (32, 48),
    "num_attention_heads": (2, 4),
    "num_query_groups": (None, 1, 2),
    "head_size": (None, 8, 24),
    "ffn_hidden_size": (None, 40),
    "max_position_embeddings": (24, 30),
    "vocab_size": (None, 777),
    "norm_epsilon": (1e-5, 1e-3),
    "position_offset": (0, 1, 2),
    "rotary_base": (1e4, 500.0),
    "relative_buckets": (8, 32),
    "relative_max_distance": (12, 128),
    "num_segments": (0, 1, 3),
}


def values_of(name: str) -> tuple[Any, ...]:
    default = getattr(ModelConfig(), name)
    if isinstance(default, bool):
        return (False, True)
    return tuple(type(default)) if isinstance(default, Enum) else NUMBERS[name]


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(FAMILIES)),
    changes=st.dictionaries(st.sampled_from(DECISIVE), st.integers(0, 11), max_size=4),
    next_sentence=st.booleans(),
)
def test_any_settings_have_a_counterpart_that_tells_them_all_or_none(
    name: str, changes: dict[str, int], next_sentence: bool
) -> None:
    """No setting gets lost on the way to transformers, and none ends in an exception of another kind."""
    values = {field: values_of(field)[index % len(values_of(field))] for field, index in changes.items()}
    model = replace(FAMILIES[name], **values)
    pairs = next_sentence and model.architecture is Architecture.encoder
    try:
        config = written(model, next_sentence=pairs)
    except (NoCounterpart, ConfigError):  # the latter where heads do not divide the hidden size
        return
    stored_form(resolve_model(model), parameter_shapes(resolve_model(model), 777, next_sentence=pairs))
    found, expected = decisive(replace(ModelConfig(), **settings_of(config).settings)), decisive(model)
    looked_at = {field for field in expected if is_read(field, resolve_model(model))}
    assert {field: found[field] for field in looked_at} == {field: expected[field] for field in looked_at}


@dataclass
class WithNewSettings(ResolvedModel):
    """As it is when a setting has been added, and transformers' families have not been told."""

    query_key_norm: bool = False
    logit_cap: float = 0.0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_setting_that_a_family_does_not_know_has_no_counterpart(name: str) -> None:
    resolved = resolve_model(FAMILIES[name])
    model = WithNewSettings(**{field.name: getattr(resolved, field.name) for field in fields(ResolvedModel)})
    assert counterpart(model) == counterpart(resolved)
    for word, value in (("query_key_norm=true", True), ("logit_cap=30", 30.0)):
        changed = replace(model, **{word.partition("=")[0]: value})
        with pytest.raises(NoCounterpart, match=rf"of transformers has no model\.{word}$"):
            counterpart(changed)


def test_a_parameter_that_a_family_has_no_place_for_has_no_counterpart() -> None:
    model = resolve_model(LLAMA)
    shapes = parameter_shapes(model, 777) | {"layers.0.attention.query_norm.weight": (8,)}
    with pytest.raises(NoCounterpart, match=r"no place for the parameters layers\.0\.attention\.query_norm\.weight"):
        stored_form(model, shapes)
