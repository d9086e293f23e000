"""What clipped steps do to the weights, by an optimizer that shows the size of a gradient.

Adam's updates hardly change when all gradients are 5 % larger, so that no loss tells of a wrong clip coefficient. SGD's
do: they are held to those of one rank without DeepSpeed for every way in which DeepSpeed clips.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from megatron_lite.config.schema import LossScaleConfig, OptimizerConfig, OptimizerName, Precision, RunConfig
from megatron_lite.verify.equivalence import TOLERANCE, Trace, differences, trace_twin
from tests.distributed.harness import run_ranks
from tests.distributed.layout_ranks import updates_rank
from tests.distributed.test_equivalence import VOCAB_SIZE, run_config

NUM_STEPS = 3
LAYOUTS = {
    "zero0": {"dp": 2, "zero_stage": 0},
    "zero1": {"dp": 2},
    "zero1_offload": {"dp": 2, "offload_optimizer": True},
    "zero2": {"dp": 2, "zero_stage": 2},
    "zero2_offload": {"dp": 2, "zero_stage": 2, "offload_optimizer": True},
    "zero3": {"dp": 2, "zero_stage": 3},
    "zero3_offload": {"dp": 2, "zero_stage": 3, "offload_optimizer": True},
    "zero1_tp2": {"tp": 2},
    "zero1_pp2": {"pp": 2},
}
FP32_ALONE = ("zero0", "zero1_tp2", "zero1_pp2")  # a reference, and layouts that clip in each precision as zero1 does
CASES = [(layout, precision) for layout in LAYOUTS for precision in Precision if layout not in FP32_ALONE]
CASES += [(layout, Precision.fp32) for layout in FP32_ALONE]
# Largest relative difference of a parameter's update: half precision rounds its gradients.
TOLERANCES = {Precision.fp32: TOLERANCE, Precision.bf16: 0.03, Precision.fp16: 0.01}


def _config(layout: str, precision: Precision) -> RunConfig:
    """Momentum, decay of the matrices and a warm-up take part; every step is clipped."""
    config = run_config("llama", **LAYOUTS[layout])
    optimizer = OptimizerConfig(
        name=OptimizerName.sgd, learning_rate=1.0, warmup_steps=2, momentum=0.5, weight_decay=0.01, clip_grad_norm=0.1
    )
    train = replace(config.train, precision=precision, loss_scale=LossScaleConfig(initial_power=10))
    return replace(config, model=replace(config.model, num_layers=2), optimizer=optimizer, train=train)


@functools.cache
def twin() -> Trace:
    trace = trace_twin(_config("zero1", Precision.fp32), VOCAB_SIZE, NUM_STEPS)
    assert min(trace.grad_norms) > 0.1, "the case would not clip"
    return trace


@functools.cache
def _traces() -> dict[tuple[str, Precision], list[tuple[Trace, Trace]]]:
    """Of each case every rank's traces, as it is and with the fault. Two ranks do them all: they start once."""
    configs = [_config(layout, precision) for layout, precision in CASES]
    ranks = run_ranks(
        updates_rank, 2, configs, VOCAB_SIZE, NUM_STEPS, "clip_coefficient_too_large", timeout_seconds=300
    )
    return dict(zip(CASES, map(list, zip(*ranks, strict=True)), strict=True))


def _of_updates(traces: list[Trace]) -> dict[str, float]:
    found = differences(twin(), traces)
    return {name: difference for name, difference in found.items() if name.startswith("update")}


@pytest.mark.parametrize(("layout", "precision"), CASES)
def test_clipped_steps_change_the_weights_as_one_rank_does(layout: str, precision: Precision) -> None:
    found = _of_updates([right for right, _ in _traces()[layout, precision]])
    assert found.keys() == {f"update of {name}" for name in twin().updates}
    what, difference = next(iter(found.items()))
    assert difference <= TOLERANCES[precision], f"{what} differs by {difference:.1e}"


@pytest.mark.parametrize(("layout", "precision"), CASES)
def test_clip_coefficient_off_by_five_percent_is_caught(layout: str, precision: Precision) -> None:
    what, difference = next(iter(_of_updates([wrong for _, wrong in _traces()[layout, precision]]).items()))
    assert difference > 1.5 * TOLERANCES[precision], f"went unnoticed: {what} differs by {difference:.1e}"
