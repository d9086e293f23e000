"""Half precision follows the fp32 loss curve, and fp16's loss scale works as specified."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest

from megatron_lite.config.schema import LossScaleConfig, OptimizerName, Precision, RunConfig
from megatron_lite.verify.equivalence import Trace, trace_twin
from tests.distributed.equivalence_cases import VOCAB_SIZE, run_config
from tests.distributed.harness import run_ranks
from tests.distributed.layout_ranks import fp16_growth_rank, fp16_scales_rank, layout_rank

NUM_STEPS = 20
LAYOUTS = {
    "dp2_pp2": (4, {"dp": 2, "pp": 2}),
    "tp2": (2, {"tp": 2}),
    "zero2_dp2": (2, {"dp": 2, "zero_stage": 2}),
    "zero3_dp2": (2, {"dp": 2, "zero_stage": 3}),
}


CASES = [("llama", layout) for layout in LAYOUTS]
CASES += [("bert", "dp2_pp2"), ("t5", "dp2_pp2"), ("bart", "tp2")]


def _config(layout: str, precision: Precision, model: str = "llama") -> RunConfig:
    config = run_config(model, **LAYOUTS[layout][1])
    # A learning rate at which twenty steps change the loss by far more than the tolerance below.
    optimizer = replace(config.optimizer, learning_rate=1e-2, min_learning_rate=1e-3, z_loss_weight=0.0)
    train = replace(config.train, precision=precision, steps=NUM_STEPS, loss_scale=LossScaleConfig(initial_power=10))
    return replace(config, optimizer=optimizer, train=train)


@cache
def twin(model: str) -> Trace:
    """The fp32 reference in one process; it is the same for every layout."""
    return trace_twin(_config("dp2_pp2", Precision.fp32, model), VOCAB_SIZE, NUM_STEPS)


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp16])
@pytest.mark.parametrize(("model", "layout"), CASES)
def test_half_precision_follows_fp32(model: str, layout: str, precision: Precision) -> None:
    config = _config(layout, precision, model)
    reference = twin(model)
    trace = run_ranks(layout_rank, LAYOUTS[layout][0], config, VOCAB_SIZE, NUM_STEPS, None)[0]
    drop = reference.losses[0] - reference.losses[-1]
    assert drop > 0.2, "the reference learned too little for the comparison to mean anything"
    worst = max(abs(mine - theirs) for mine, theirs in zip(trace.losses, reference.losses, strict=True))
    assert worst < 0.05 * drop


def test_bf16_accumulates_gradients_in_fp32() -> None:
    """The sum over 64 micro-batches: in bf16 it would lose terms below 1/256 of the running sum."""
    config = _config("dp2_pp2", Precision.bf16)
    config = replace(config, train=replace(config.train, global_batch_size=128, steps=1))
    in_fp32 = replace(config, train=replace(config.train, precision=Precision.fp32))
    reference = trace_twin(in_fp32, VOCAB_SIZE, 1)
    trace = run_ranks(layout_rank, 4, config, VOCAB_SIZE, 1, None)[0]
    assert trace.grad_norms[0] == pytest.approx(reference.grad_norms[0], rel=5e-3)


def test_bf16_with_offload_sums_tied_gradients_over_stages() -> None:
    """DeepSpeed's own sum skips them: the norm would lack what the head adds to the word embedding's gradient."""
    config = run_config("gpt2", pp=2, offload_optimizer=True)
    reference = trace_twin(config, VOCAB_SIZE, 1)
    in_bf16 = replace(config, train=replace(config.train, precision=Precision.bf16))
    trace = run_ranks(layout_rank, 2, in_bf16, VOCAB_SIZE, 1, None)[0]
    assert trace.grad_norms[0] == pytest.approx(reference.grad_norms[0], rel=5e-3)


def test_fp16_overflow_skips_halves_and_regrows() -> None:
    config = _config("dp2_pp2", Precision.fp16)
    scale = LossScaleConfig(initial_power=28, window=4, hysteresis=1)
    config = replace(config, train=replace(config.train, loss_scale=scale))
    for records in run_ranks(fp16_scales_rank, 4, config, VOCAB_SIZE, NUM_STEPS):
        skipped = [skipped for skipped, _, _ in records]
        scales = [scale for _, scale, _ in records]
        assert skipped[0], "a loss scale of 2^28 must overflow"
        assert not all(skipped)
        first_good = skipped.index(False)
        assert all(later == earlier / 2 for earlier, later in pairwise(scales[:first_good]))
        assert max(scales[first_good:]) > scales[first_good], "it never grew again"
        changed = [weight_changed for _, _, weight_changed in records]
        assert changed == [not skip for skip in skipped], "a skipped step changed the weights, or a good one did not"


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_fp16_step_in_which_the_scale_grows_is_no_smaller(zero_stage: int) -> None:
    """Unpatched, DeepSpeed 0.19.8 divides that step's gradients by the new scale, which halves the step."""
    config = run_config("llama", zero_stage=zero_stage)
    scale = LossScaleConfig(initial_power=4, window=2)
    train = replace(config.train, precision=Precision.fp16, loss_scale=scale, steps=5)
    optimizer = replace(config.optimizer, name=OptimizerName.sgd, clip_grad_norm=0.0, weight_decay=0.0)
    (records,) = run_ranks(fp16_growth_rank, 1, replace(config, train=train, optimizer=optimizer), VOCAB_SIZE)
    scales = [scale for _, scale in records]
    assert scales[-1] > scales[0], "the scale never grew"
    assert [moved for moved, _ in records] == pytest.approx([1.0] * 5, rel=1e-2)
