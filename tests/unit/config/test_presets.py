"""Every shipped preset composes, is valid, and has the size that its source publishes."""

from __future__ import annotations

import pytest

from megatron_lite.config.compose import CONF_DIR, available_scripts, compose, preset_groups
from megatron_lite.config.derived import parameter_counts, resolve, world_size
from megatron_lite.config.validate import problems

NEEDS = {"data=files": ["data.source=corpus.txt"]}  # presets that ask the user for a value
PRESETS = [f"{group}={path.stem}" for group in preset_groups() for path in sorted((CONF_DIR / group).glob("*.yaml"))]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("script", available_scripts())
def test_preset_is_valid(script: str, preset: str) -> None:
    config = resolve(compose(script, [preset, *NEEDS.get(preset, [])]), device="cpu")
    assert problems(config) == []


def test_preset_that_needs_a_value_says_so() -> None:
    assert problems(resolve(compose("pretrain_gpt", ["data=files"]))) == [
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
    model = compose("pretrain_gpt", [f"model={name}"]).model
    assert model.vocab_size is not None
    assert parameter_counts(model, model.vocab_size).total / 1e6 == millions


def test_demo_uses_all_three_axes() -> None:
    config = resolve(compose("pretrain_gpt", ["experiment=demo"]))
    parallel = config.parallel
    sizes = (parallel.data_parallel_size, parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
    assert sizes == (2, 2, 2)
    assert world_size(config) == 8
