"""Derived sizes against figures worked out by hand."""

from __future__ import annotations

import pytest

from megatron_lite.config.compose import compose
from megatron_lite.config.derived import (
    complete_model,
    data_parallel_size,
    num_micro_batches,
    padded_vocabulary,
    parameter_counts,
    resolve,
    run_directory,
    world_size,
)
from megatron_lite.config.schema import Activation, ModelConfig


def test_complete_model_fills_what_is_open_and_keeps_what_is_set() -> None:
    filled = complete_model(ModelConfig(hidden_size=768, num_attention_heads=12))
    assert (filled.num_query_groups, filled.head_size, filled.ffn_hidden_size) == (12, 64, 3072)
    given = ModelConfig(num_query_groups=2, head_size=80, ffn_hidden_size=100)
    assert complete_model(given) == given


@pytest.mark.parametrize(("hidden", "inner"), [(4096, 10944), (576, 1536), (128, 384), (48, 128)])
def test_swiglu_width_is_eight_thirds_rounded_up_to_64(hidden: int, inner: int) -> None:
    model = ModelConfig(hidden_size=hidden, activation=Activation.swiglu)
    assert complete_model(model).ffn_hidden_size == inner


def test_resolving_is_idempotent_and_does_not_touch_its_argument() -> None:
    config = compose("pretrain_gpt", ["parallel=tp2"])
    before = repr(config)
    once = resolve(config, device="cpu")
    assert resolve(once) == once
    assert repr(config) == before
    assert (once.launcher.num_processes, once.launcher.device) == (2, "cpu")


def test_open_data_parallel_size_follows_the_processes() -> None:
    config = compose("pretrain_gpt", ["parallel=tp2", "parallel.data_parallel_size=null"])
    assert data_parallel_size(config) == 1
    assert data_parallel_size(config, 8) == 4
    assert resolve(config, world_size=8).parallel.data_parallel_size == 4
    assert resolve(config, world_size=7).parallel.data_parallel_size is None  # no layout has 7: validation says so
    with_processes = compose("pretrain_gpt", ["parallel=tp2", "parallel.data_parallel_size=null",
                                              "launcher.num_processes=6"])  # fmt: skip
    assert world_size(with_processes) == 6


def test_micro_batches() -> None:
    config = compose("pretrain_gpt", ["experiment=demo", "train.global_batch_size=32", "train.micro_batch_size=4"])
    assert num_micro_batches(config) == 4
    assert num_micro_batches(config, global_batch_size=16) == 2


def test_padded_vocabulary_gives_every_rank_whole_multiples() -> None:
    config = compose("pretrain_gpt", ["parallel=tp2"])
    assert padded_vocabulary(config, 50257) == 50432
    assert padded_vocabulary(config, 50432) == 50432


def test_run_folder_is_stable_and_names_the_layout() -> None:
    config = compose("pretrain_gpt", ["parallel=dp2_tp2_pp2"])
    assert str(run_directory(config)) == "runs/pretrain_gpt-gpt_tiny-dp2_tp2_pp2"
    assert str(run_directory(compose("pretrain_gpt", ["train.run_dir=mine/run"]))) == "mine/run"


@pytest.mark.parametrize("name", ["gpt_tiny", "llama_tiny"])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_stages_together_hold_the_model(name: str, stages: int) -> None:
    """A tied matrix lies on the first and on the last stage, and is one matrix where these are one."""
    model = compose("pretrain_gpt", [f"model={name}"]).model
    counts = parameter_counts(model, 8192)
    per_stage = [counts.stage(model.num_layers // stages, first=i == 0, last=i == stages - 1) for i in range(stages)]
    copies = counts.head if counts.tied and stages > 1 else 0
    assert sum(per_stage) == counts.total + copies


def test_one_tensor_parallel_rank_by_hand() -> None:
    """h 128, 4 heads, f 512, v 8192, two ranks: matrices are halved, norms and the biases behind them are not."""
    counts = parameter_counts(ModelConfig(), 8192, tensor_parallel_size=2)
    attention = 128 * 3 * 64 + 3 * 64 + 64 * 128 + 128
    mlp = 128 * 256 + 256 + 256 * 128 + 128
    assert counts.layer == attention + mlp + 2 * 2 * 128
    assert counts.embedding == 4096 * 128
    assert counts.position_embedding == 1024 * 128
    assert counts.final_norm == 256
