"""Figures of layers and sequences equal those of one rank in any layout, and a dropped update leaves no trace."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar
from unittest import mock

import pytest

from megatron_lite.config.rules.training import FP16_ON_CPU
from megatron_lite.config.schema import OptimizerName, Precision, RunConfig
from megatron_lite.engine.gradient_norms import layer_of
from megatron_lite.verify.equivalence import trace_twin
from tests.distributed.equivalence_cases import LAYOUTS, VOCAB_SIZE, run_config
from tests.distributed.harness import run_ranks
from tests.distributed.watching_ranks import DROPPED_STEP, Watched, norms_of_rank, poisoned_rank, watched_rank

T = TypeVar("T")
TOLERANCE = 1e-5
STEPS = 5
FP32 = ("zero0_dp2_pp2", "dp2_tp2_pp2", "zero2_dp2_tp2", "zero3_dp2", "offload_zero1_dp2_pp2", "offload_zero2_dp2")
CASES = [("gpt2", layout) for layout in (*FP32, "offload_zero3_dp2", "sequence_parallel_tp2")]
CASES += [("bert", "dp2_tp2_pp2"), ("t5", "dp2_tp2_pp2"), ("llama", "zero3_dp2_tp2")]


def config_of(model: str, layout: str, **train: object) -> RunConfig:
    return steady(run_config(model, **LAYOUTS[layout]), **train)


def steady(config: RunConfig, **train: object) -> RunConfig:
    """Use SGD for BERT: in the last step the gradients of the pooler from the two classes nearly cancel, so rounding
    errors in the weights are amplified. After Adam the error was 1.03e-5 on one processor, after SGD it is 3e-6."""
    optimizer = config.optimizer
    if config.model.num_segments:
        optimizer = replace(optimizer, name=OptimizerName.sgd, momentum=0.9, learning_rate=1e-2)
    return replace(config, optimizer=optimizer, train=replace(config.train, steps=STEPS, **train))


def ranks_of(function: Callable[[RunConfig, int], T], config: RunConfig, vocab_size: int = VOCAB_SIZE) -> list[T]:
    parallel = config.parallel
    ranks = (parallel.data_parallel_size or 1) * parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    return run_ranks(function, ranks, config, vocab_size)


def watched(config: RunConfig) -> list[Watched]:
    return ranks_of(watched_rank, config)


@functools.cache
def twin(model: str) -> Watched:
    """One rank with unpartitioned tensors and torch's own optimizer."""
    return watched(steady(run_config(model, zero_stage=0)))[0]


def close(found: object, expected: object, tolerance: float = TOLERANCE) -> None:
    assert found == pytest.approx(expected, rel=tolerance, abs=1e-9)


@pytest.mark.parametrize("model", ["gpt2", "bert", "t5"])
def test_twin_is_right(model: str) -> None:
    """Compared with the raw gradients of a loop without DeepSpeed, and with weights before and after the step."""
    config = run_config(model, zero_stage=0)
    trace = trace_twin(config, VOCAB_SIZE, 2)
    squares: dict[str, float] = {}
    for name, gradient in trace.gradients.items():
        squares[layer_of(name)] = squares.get(layer_of(name), 0.0) + float(gradient.double().square().sum())
    found = twin(model)
    close(dict(found.layers[0].grad_norm), {layer: square**0.5 for layer, square in squares.items()})
    for step in range(1, STEPS):
        if step + 1 != DROPPED_STEP:
            close(dict(found.layers[step].update_ratio), found.expected_ratios[step], 1e-4)
            assert any(found.expected_ratios[step].values())


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_any_layout(model: str, layout: str) -> None:
    expected = twin(model)
    ranks = watched(config_of(model, layout))
    for rank in ranks:
        assert rank.judged == ranks[0].judged, "ranks judge by figures that differ"
        assert rank.dropped_nothing
        assert rank.updates == (0 if model == "bert" else STEPS - 1)  # SGD counts none
        assert rank.layers == ranks[0].layers
    found = ranks[0]
    close([value for pair in found.judged for value in pair], [value for pair in expected.judged for value in pair])
    close([result.loss for result in found.results], [result.loss for result in expected.results])
    close([result.grad_norm for result in found.results], [result.grad_norm for result in expected.results])
    close([result.grad_norm for result in found.results], [norm for _, norm in found.judged])
    close([result.loss for result in found.results], [loss for loss, _ in found.judged])
    assert [result.skipped for result in found.results] == [step == DROPPED_STEP for step in range(1, STEPS + 1)]
    for step in range(STEPS):
        close(dict(found.layers[step].grad_norm), dict(expected.layers[step].grad_norm))
        close(dict(found.layers[step].update_ratio), dict(expected.layers[step].update_ratio), 1e-4)
        close(found.sequences[step], expected.sequences[step])
        assert found.recent[step + 1] == pytest.approx(found.layers[step].grad_norm)
    assert len(found.memory) == run_config(model, **LAYOUTS[layout]).parallel.pipeline_parallel_size
    assert min(found.memory) > 50 * 2**20  # a Python process with torch is never smaller


@pytest.mark.parametrize(
    ("precision", "layout"),
    [
        (Precision.bf16, "tp2_pp2"),
        (Precision.bf16, "zero2_dp2"),
        (Precision.bf16, "zero3_dp2"),
        (Precision.fp16, "dp2"),
        (Precision.fp16, "zero3_dp2"),
    ],
)
def test_low_precision(precision: Precision, layout: str) -> None:
    """Figures agree with fp32 within half precision; a dropped update does not change the loss scale."""
    with mock.patch.dict(os.environ, {FP16_ON_CPU: "1"}):
        ranks = watched(config_of("gpt2", layout, precision=precision))
    expected, found = twin("gpt2"), ranks[0]
    for rank in ranks:
        assert rank.judged == found.judged
        assert rank.dropped_nothing
        assert rank.updates == STEPS - 1
    for step in range(STEPS):
        close(dict(found.layers[step].grad_norm), dict(expected.layers[step].grad_norm), 0.1)
        close(found.sequences[step], expected.sequences[step], 0.02)
    assert len({result.loss_scale for result in found.results}) == 1


@pytest.mark.parametrize(
    ("precision", "layout"),
    [
        (Precision.fp32, "tp2_pp2"),
        (Precision.fp32, "offload_zero2_dp2"),
        (Precision.fp32, "zero3_dp2"),
        (Precision.bf16, "tp2_pp2"),
        (Precision.bf16, "zero2_dp2"),
        (Precision.bf16, "zero3_dp2"),
        (Precision.fp16, "dp2"),
        (Precision.fp16, "zero3_dp2"),
    ],
)
def test_a_non_finite_gradient(precision: Precision, layout: str) -> None:
    """NaN in one element on one rank: every rank drops the update, and the next step is applied."""
    with mock.patch.dict(os.environ, {FP16_ON_CPU: "1"}):
        found = ranks_of(poisoned_rank, config_of("gpt2", layout, precision=precision))
    assert found == [[(False, True, True), (True, False, False)]] * len(found)


@pytest.mark.parametrize("layout", ["one_rank", "dp2", "offload_zero2_dp2", "zero3_dp2"])
def test_norm_of_a_large_parameter(layout: str) -> None:
    """torch's fp32 norm on a CPU is off by 1e-5 for a million elements."""
    for measured, expected in ranks_of(norms_of_rank, config_of("llama", layout), vocab_size=40_000):
        close(measured, expected, 1e-6)


@pytest.mark.parametrize("name", [OptimizerName.sgd, OptimizerName.adafactor])
def test_other_optimizers(name: OptimizerName) -> None:
    config = config_of("gpt2", "zero0_dp2_pp2" if name is OptimizerName.adafactor else "dp2")
    config = replace(config, optimizer=replace(config.optimizer, name=name))
    assert all(rank.dropped_nothing for rank in watched(config))
