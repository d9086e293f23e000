"""Each family as transformers has it: its class reads what we write, tensors included. No model computes anything here.

All of FAMILIES is tested. Its case in tests/distributed/reference_models.py shows that logits and gradients are equal.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
import transformers

from megatron_lite.config.derived import resolve_model
from megatron_lite.config.hf import NoCounterpart, hf_config, settings_of
from megatron_lite.config.hf.decoders import LLAMA
from megatron_lite.config.hf.families import FAMILIES, Family, counterpart
from megatron_lite.config.hf.family import REMOVED, keys
from megatron_lite.config.hf.tensors import module
from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.config.schema import Activation, ModelConfig
from megatron_lite.data.special import SpecialTokens
from megatron_lite.errors import ConfigError
from megatron_lite.models.hf.builder import build_form
from megatron_lite.models.shapes import parameter_shapes
from tests.distributed.reference_models import CASES
from tests.tiny_models import GPT2
from tests.tiny_models import LLAMA as TINY_LLAMA

VOCAB_SIZE = 61
TOKENS = SpecialTokens(eod=0, pad=1, cls=2, sep=3)
HOME = "its record in megatron_lite/config/hf/"


def smallest(family: Family) -> ResolvedModel:
    """A model of two layers with the first value of everything that the family fixes."""
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 24}
    sizes |= {name: {"position_offset": 2}.get(name, 1) for name in family.nonzero}
    fixed = {name: values[0] for name, values in family.fixed.items()}
    first = next(iter(family.activations.values()))
    return resolve_model(ModelConfig(**{**sizes, **fixed, "activation": first, "family": family.model_type}))


def described(family: Family) -> dict[str, Any]:
    config = hf_config(smallest(family), vocab_size=VOCAB_SIZE, tokens=TOKENS, next_sentence=family.next_sentence)
    read: dict[str, Any] = json.loads(json.dumps(config))
    return read


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_every_parameter_has_a_place(family: Family) -> None:
    model = smallest(family)
    shapes = parameter_shapes(model, VOCAB_SIZE, next_sentence=family.next_sentence)
    placed = {piece.source for piece in build_form(family, model, shapes).pieces}
    lost = [name for name in shapes if name not in placed]
    assert not lost, f"add the module of {lost[0]} to `tensors` of {family.model_type} ({HOME}), as all of {lost}"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_the_class_of_transformers_has_these_tensors(family: Family) -> None:
    config = transformers.AutoConfig.for_model(**described(family))
    with torch.device("meta"):
        theirs = getattr(transformers, family.architecture)(config)
    model = smallest(family)
    ours = build_form(family, model, parameter_shapes(model, VOCAB_SIZE, next_sentence=family.next_sentence)).shapes
    there = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    wrong = {name: shape for name, shape in ours.items() if there.get(name) != shape}
    assert not wrong, f"{family.architecture} has no {wrong}; correct `tensors` of {family.model_type} ({HOME})"
    needed = {name for name, _ in theirs.named_parameters()}  # of tied ones the first
    lost = sorted(needed - ours.keys())
    assert not lost, f"{family.architecture} needs {lost}; add them to `tensors` of {family.model_type} ({HOME})"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_every_key_is_one_of_the_class(family: Family) -> None:
    """transformers drops no key that we write: a misspelt one would be kept, but have no effect."""
    config = getattr(transformers, family.architecture).config_class()
    known = {*config.to_dict(), *config.attribute_map, *dir(config), "decoder_start_token_id"}
    # T5 has no limit of positions, but its files have this key
    read = {*family.keys, *family.tokens, *family.constants, family.activation_key} - {"n_positions"}
    assert sorted(read - known) == [], f"misspelt in {HOME}"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_what_is_missing_means_what_transformers_assumes(family: Family) -> None:
    """The defaults of the record are those of the class."""
    theirs = getattr(transformers, family.architecture).config_class()
    assert theirs.vocab_size == family.vocab_size
    for key, entry in family.keys.items():
        if entry.default is not None and key != "n_positions":
            assert getattr(theirs, key) == entry.default, f"default of {key} in {HOME}"
    assert family.activations[family.default_activation] in family.activations.values()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_the_record_is_read_as_it_is_written(family: Family) -> None:
    found = settings_of(described(family))
    assert found.family.model_type == family.model_type
    model = resolve_model(ModelConfig(**found.settings))
    assert counterpart(model, next_sentence=family.next_sentence) == family
    for name in family.held:
        if name not in ("vocab_size", "num_decoder_layers") and not name.endswith("_dropout"):
            assert getattr(model, name) == getattr(smallest(family), name), name


def test_each_family_has_a_case_that_shows_equal_logits() -> None:
    cases = [counterpart(resolve_model(case.model), next_sentence=case.next_sentence) for case in CASES.values()]
    lost = [family.architecture for family in FAMILIES if family not in cases]
    assert not lost, f"add a case for {lost} to tests/distributed/reference_models.py"


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        (
            {"keys": {"rms_norm_eps": REMOVED}},
            "nothing is said of norm_epsilon, which every such model uses; add it",
        ),
        ({"parts": ()}, "nothing is said of rotary_base"),
        ({"fixed": {"attention_scale": REMOVED}}, "nothing is said of attention_scale"),
        ({"fixed": {"normalisation": (1,)}}, "normalisation is no field of ModelConfig; correct the name"),
        ({"fixed": {"architecture": REMOVED}}, "name its one Architecture in `fixed`"),
        (
            {"tokens": {"pad_token_id": REMOVED}},
            "no token is named for pad_token_id of config.json; add it to `tokens`",
        ),
        ({"tokens": {"pad_token_id": ("padding",)}}, "padding in `tokens` is no role; use eod, bos, eos, cls, sep, p"),
        ({"tensors": {"head": REMOVED}}, "head has no place; add it to `tensors`"),
        ({"absent": {"window": 5}}, "window is in `absent` only; add the supported values to `demands`"),
    ],
)
def test_an_incomplete_record_says_what_to_write(changes: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match="the family new: ") as caught:
        Family.like(LLAMA, model_type="new", **changes)
    assert remedy in str(caught.value)


def test_a_family_like_another_one_differs_by_what_is_given() -> None:
    made = Family.like(LLAMA, model_type="new", tensors={"final_norm": module("x"), "layers.*.mlp.up": module("y")})
    assert made.tensors == {**LLAMA.tensors, "final_norm": module("x"), "layers.*.mlp.up": module("y")}
    assert dataclasses.replace(made, model_type="llama", tensors=LLAMA.tensors) == LLAMA


def test_one_key_for_two_settings_holds_one_value(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"attention_bias": REMOVED, "mlp_bias": REMOVED, **keys(use_bias=(("attention_bias", "mlp_bias"), False))}
    monkeypatch.setattr("megatron_lite.config.hf.families.FAMILIES", (Family.like(LLAMA, keys=both),))
    assert counterpart(resolve_model(dataclasses.replace(TINY_LLAMA, attention_bias=True, mlp_bias=True)))
    with pytest.raises(NoCounterpart, match=r"one use_bias for model.attention_bias=true and model.mlp_bias=false$"):
        counterpart(resolve_model(dataclasses.replace(TINY_LLAMA, attention_bias=True)))


def test_a_family_is_written_where_it_is_named() -> None:
    assert counterpart(resolve_model(TINY_LLAMA)).model_type == "llama"
    named = dataclasses.replace(TINY_LLAMA, family="mistral")
    assert counterpart(resolve_model(named)).model_type == "mistral"
    with pytest.raises(NoCounterpart, match=r"^MistralForCausalLM of transformers has rmsnorm for"):
        counterpart(resolve_model(dataclasses.replace(GPT2, family="mistral")))
    with pytest.raises(NoCounterpart, match=r"model\.family=mistrall is not known; use gpt2, "):
        counterpart(resolve_model(dataclasses.replace(GPT2, family="mistrall")))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sliding_window": 4096}, "sliding_window=4096 is not supported; supported: null"),
        ({"sliding_window": ...}, "sliding_window=4096 is not supported; supported: null"),  # what transformers assumes
        ({"attention_bias": True}, "attention_bias=true is a key that we do not know for model_type=mistral"),
    ],
)
def test_a_mistral_with_a_window_is_refused(changes: dict[str, Any], problem: str) -> None:
    model = dataclasses.replace(TINY_LLAMA, family="mistral", num_query_groups=2)
    config = hf_config(resolve_model(model), vocab_size=VOCAB_SIZE, tokens=TOKENS)
    assert settings_of(config).settings["family"] == "mistral"
    assert settings_of(config).settings["activation"] is Activation.swiglu
    with pytest.raises(ConfigError, match=problem):
        settings_of({key: value for key, value in (config | changes).items() if value is not ...})


def test_a_model_that_only_a_named_family_computes() -> None:
    """LLaMA's class refuses heads that do not divide the hidden size, and Mistral's takes them."""
    model = dataclasses.replace(TINY_LLAMA, family="mistral", num_attention_heads=3, head_size=16)
    config = hf_config(resolve_model(model), vocab_size=VOCAB_SIZE, tokens=TOKENS)
    assert settings_of(config).settings["family"] == "mistral"
    with pytest.raises(NoCounterpart, match=r"no model\.num_attention_heads=3 that does not divide"):
        counterpart(resolve_model(dataclasses.replace(model, family=None)))
