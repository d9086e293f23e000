"""Every shipped preset composes, is valid, and has the size that its source publishes."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_lite.config.compose import compose
from megatron_lite.config.derived import (
    fill_in,
    has_next_sentence_head,
    parameter_counts,
    resolve,
    resolve_model,
)
from megatron_lite.config.hf import hf_config
from megatron_lite.config.preset_folders import SHIPPED, PresetFolders
from megatron_lite.config.schema import ModelConfig, ObjectiveConfig, ObjectiveName
from megatron_lite.config.validate import problems
from megatron_lite.data.special import SpecialTokens

NEEDS = {  # presets that ask the user for another setting
    "data=files": ["data.source=corpus.txt"],
    "model=roberta_base": ["objective=masked_lm"],
    "launcher=example_site": ["parallel.data_parallel_size=null"],  # one process for each of its GPUs
}
OF_ONE_SCRIPT = ("model", "objective", "experiment")  # groups that say what is trained
PRESETS = {
    group: [f"{group}={path.stem}" for path in sorted((SHIPPED / group).glob("*.yaml"))]
    for group in PresetFolders().groups()
}
MODELS_OF_BERT_AND_T5 = ("bert_base", "bert_large", "roberta_base", "t5_small", "t5_base", "t5_v1_1_base", "bart_base")


def problems_of(script: str, preset: str) -> list[str]:
    return problems(fill_in(compose(script, [preset, *NEEDS.get(preset, [])]), device="cpu"))


def script_of(model: str) -> str:
    """That which trains BERT and RoBERTa, or T5 and BART."""
    return "pretrain_bert" if "bert" in model else "pretrain_t5"


@pytest.mark.parametrize("preset", [name for group in PRESETS if group not in OF_ONE_SCRIPT for name in PRESETS[group]])
@pytest.mark.parametrize("script", PresetFolders().scripts())
def test_preset_is_valid_everywhere(script: str, preset: str) -> None:
    assert problems_of(script, preset) == []


@pytest.mark.parametrize("preset", [name for group in OF_ONE_SCRIPT for name in PRESETS[group]])
def test_preset_is_valid_with_its_script_and_refused_by_the_others(preset: str) -> None:
    found = {script: problems_of(script, preset) for script in PresetFolders().scripts()}
    assert len([script for script, texts in found.items() if not texts]) == 1
    for texts in filter(None, found.values()):
        assert texts[0].startswith(("model.architecture=", "objective.name="))


def test_each_objective_has_its_preset() -> None:
    names = {compose("pretrain_gpt", [preset]).objective.name for preset in PRESETS["objective"]}
    assert names == set(ObjectiveName)
    for preset in PRESETS["objective"]:  # they show the defaults
        objective = compose("pretrain_gpt", [preset]).objective
        assert objective == ObjectiveConfig(name=objective.name)
        assert preset == f"objective={objective.name.value}"


def test_preset_that_needs_a_value_says_so() -> None:
    assert problems(fill_in(compose("pretrain_gpt", ["data=files"]))) == [
        "data.source=null names no text; give a file or a list of files, or use data.source=embedded"
    ]


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        # Exact counts of the released checkpoints, tied weights once (GPT-2, LLaMA, SmolLM2).
        ("gpt2_124m", 124.439808),
        ("gpt2_350m", 354.823168),
        ("llama_7b", 6738.415616),
        ("smollm2_135m", 134.515008),
        # GPT-3's table gives rounded figures.
        ("gpt3_1b3", pytest.approx(1300, rel=0.02)),
        ("gpt3_6b7", pytest.approx(6700, rel=0.02)),
        ("gpt3_175b", pytest.approx(175000, rel=0.01)),
    ],
)
def test_published_size(name: str, millions: float) -> None:
    model = resolve_model(compose("pretrain_gpt", [f"model={name}"]).model)
    assert model.vocab_size is not None
    assert parameter_counts(model, model.vocab_size).total / 1e6 == millions


def reference(transformers: Any, model: ModelConfig, *, next_sentence: bool) -> Any:
    """The model that transformers makes of our config.json."""
    assert model.vocab_size is not None
    tokens = SpecialTokens(pad=model.position_offset - 1 if model.position_offset else 0)
    config = hf_config(model, vocab_size=model.vocab_size, tokens=tokens, next_sentence=next_sentence)
    kind = getattr(transformers, config["architectures"][0])
    made = kind(kind.config_class.from_dict(config))
    if not model.tie_embeddings:  # transformers 5 ties every T5 until a checkpoint brings a head
        made.lm_head = type(made.lm_head)(model.hidden_size, model.vocab_size, bias=False)
    return made


@pytest.mark.parametrize("name", MODELS_OF_BERT_AND_T5)
def test_as_many_parameters_as_transformers_has(name: str) -> None:
    """Of the published vocabulary, tied weights once; models on the meta device have sizes and no weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = compose(script_of(name), [f"model={name}", *NEEDS.get(f"model={name}", [])])
    model = resolve_model(config.model)
    with torch.device("meta"):
        theirs = reference(transformers, model, next_sentence=has_next_sentence_head(config))
    assert model.vocab_size is not None
    counts = parameter_counts(model, model.vocab_size, next_sentence=has_next_sentence_head(config))
    assert counts.total == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize(
    ("script", "experiment"), [("pretrain_gpt", "demo"), ("pretrain_bert", "demo_bert"), ("pretrain_t5", "demo_t5")]
)
def test_demos_use_all_three_axes(script: str, experiment: str) -> None:
    config = resolve(compose(script, [f"experiment={experiment}"]))
    assert config.train.run_dir == f"runs/{experiment}"
    parallel = config.parallel
    sizes = (parallel.data_parallel_size, parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
    assert sizes == (2, 2, 2)
    assert config.topology.world_size == 8
