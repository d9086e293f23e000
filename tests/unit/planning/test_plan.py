"""The plan as the user reads it, and its figures."""

from __future__ import annotations

import pytest

from megatron_lite.config.compose import compose
from megatron_lite.config.derived import resolve
from megatron_lite.config.schema import RunConfig
from megatron_lite.planning.memory import model_states
from megatron_lite.planning.plan import describe


def config_of(*words: str) -> RunConfig:
    return resolve(compose("pretrain_gpt", list(words)), device="cpu")


def rows(text: str) -> dict[str, str]:
    """Name -> text of the plan's one-line rows."""
    lines = [line for line in text.splitlines() if line and not line.startswith(" ")]
    return {line[:17].strip(): line[17:] for line in lines}


def test_rows_of_a_three_dimensional_layout() -> None:
    config = config_of("parallel=dp2_tp2_pp2", "train.steps=10", "train.global_batch_size=32")
    text = rows(describe(config, 8000))
    assert text["world size"] == "8 = 2 data x 2 tensor x 2 pipeline"
    assert text["layers"] == "4 = 2 stages of 2"
    assert text["batch"] == "32 = 4 micro x 4 micro-batches x 2 data-parallel"
    assert text["tokens"] == "4,096 a step, 40,960 in 10 steps"
    assert text["pipeline bubble"] == "20.0% = (2 - 1) / (4 + 2 - 1) of the time"
    assert text["vocabulary"] == "8,000 padded to 8,192 = 4,096 rows x 2 tensor-parallel (multiple of 128)"
    assert text["parameters"] == (
        "1,948,416 = 4 layers of 198,272, embedding 1,024,000, positions 131,072, head tied, final norm 256; padding "
        "not counted"
    )
    assert "batch ramp" not in text


def test_rank_grid_names_every_rank_at_its_place() -> None:
    text = describe(config_of("parallel=dp2_tp2_pp2"), 8000)
    assert text.endswith(
        "rank grid\n"
        "  pp0      tp0   tp1\n"
        "    dp0       0     1\n"
        "    dp1       2     3\n"
        "  pp1      tp0   tp1\n"
        "    dp0       4     5\n"
        "    dp1       6     7"
    )


def test_large_grid_is_abbreviated() -> None:
    text = describe(config_of("experiment=gpt3_175b"), 50257)
    assert "  pp0   ranks 0 to 47: dp0-5, tp0-7" in text
    assert "  pp63  ranks 3024 to 3071: dp0-5, tp0-7" in text
    assert rows(text)["layers"] == "96 = 32 stages of 2 + 32 stages of 1"
    assert "  stage 0: embedding, positions, 2 layers;" in text
    assert "  stage 63: 1 layer, final norm, head;" in text


def test_batch_ramp_row() -> None:
    config = config_of("train.batch_ramp={start:8,increment:8,samples:1000}")
    assert rows(describe(config, 8000))["batch ramp"] == (
        "8 to 32 by 8: 4 sizes over 1,000 samples; first 8 = 4 micro x 2 micro-batches x 1 data-parallel"
    )


def test_unknown_vocabulary_leaves_out_what_hangs_on_it() -> None:
    text = rows(describe(config_of(), None))
    assert text["vocabulary"] == "known once the data is prepared (model.vocab_size=null)"
    assert "parameters" not in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # fp32 reference: weights, gradients and two moments, all whole
        (["parallel.zero_stage=0"], (4, 4, 8)),
        # ZeRO-1 in fp32 over 4 ranks: a master copy and two moments, shared
        ([], (4, 4, 12 / 4)),
        (["train.precision=bf16"], (2, 4, 12 / 4)),
        (["train.precision=bf16", "parallel.zero_stage=2"], (2, 4 / 4, 12 / 4)),
        (["train.precision=bf16", "parallel.zero_stage=3"], (2 / 4, 4 / 4, 12 / 4)),
        (["optimizer=sgd"], (4, 4, 8 / 4)),
        (["optimizer=adafactor"], (4, 4, 0)),
    ],
)
def test_bytes_per_parameter(words: list[str], expected: tuple[float, float, float]) -> None:
    states = model_states(config_of(*words), parameters=1000, data_parallel_size=4)
    assert (states.weights / 1000, states.gradients / 1000, states.optimizer / 1000) == expected
