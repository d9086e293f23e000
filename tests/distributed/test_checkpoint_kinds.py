"""Chains as in test_checkpoints.py, for the other precisions and optimizers, and for offloaded optimizer state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_lite.config.schema import LossScaleConfig, OptimizerName, Precision, RunConfig
from tests.distributed.checkpoint_ranks import MUTATIONS, Link
from tests.distributed.equivalence_cases import run_config
from tests.distributed.test_checkpoints import TOLERANCE, run_chain

NUM_STEPS = 3
DP2, TP2, PP2 = {"dp": 2}, {"tp": 2}, {"pp": 2}


def config(
    layout: dict[str, int],
    model: str = "gpt2",
    precision: Precision = Precision.fp32,
    optimizer: OptimizerName = OptimizerName.adamw,
    **parallel: object,
) -> RunConfig:
    found = run_config(model, **layout, **parallel)
    train = replace(found.train, precision=precision, steps=5 * NUM_STEPS)
    return replace(found, train=train, optimizer=replace(found.optimizer, name=optimizer))


def require_same_losses(links: Sequence[Link]) -> None:
    """Each link repeats the losses that the previous one got when it trained on without a restart."""
    for unbroken, resumed in pairwise(links):
        assert resumed.losses[:NUM_STEPS] == pytest.approx(unbroken.losses[NUM_STEPS:], rel=TOLERANCE)


def test_fp32_masters_go_through_bf16_unrounded(tmp_path: Path) -> None:
    """The files of each link are bitwise those of the previous one; losses agree within half precision."""
    bf16 = Precision.bf16
    run_chain(
        [config(TP2), config(DP2, precision=bf16, zero_stage=3), config(TP2, precision=bf16), config(PP2)],
        tmp_path,
        (NUM_STEPS, NUM_STEPS),
    )


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp16])
def test_half_precision_goes_on_bit_by_bit_in_the_same_layout(precision: Precision, tmp_path: Path) -> None:
    """fp16 with overflows before and after the restart: scale, position in its window and hysteresis are restored."""
    one = config(DP2, "llama", precision)
    scale = LossScaleConfig(initial_power=26, window=2, hysteresis=2)
    one = replace(one, train=replace(one.train, loss_scale=scale))
    before, after = run_chain([one, one], tmp_path, (NUM_STEPS, NUM_STEPS))
    assert after.losses[:NUM_STEPS] == before.losses[NUM_STEPS:]
    assert after.loss_scales[:NUM_STEPS] == before.loss_scales[NUM_STEPS:]
    if precision is Precision.fp16:
        scales = [scale for scale, _ in before.loss_scales]
        assert scales[0] != scales[NUM_STEPS - 1], "the scale never changed before the break"
        assert len(set(scales[NUM_STEPS:])) > 1, "nor after it"


def test_momentum_and_dropout(tmp_path: Path) -> None:
    layouts = ({"zero_stage": 1, **DP2}, PP2)
    found = [config(one, "gpt2_dropout", optimizer=OptimizerName.sgd) for one in layouts]
    found = [replace(one, optimizer=replace(one.optimizer, momentum=0.9)) for one in found]
    require_same_losses(run_chain(found, tmp_path, (NUM_STEPS, NUM_STEPS)))


def test_adafactors_factors(tmp_path: Path) -> None:
    found = [config(one, optimizer=OptimizerName.adafactor, zero_stage=0) for one in (TP2, PP2, {})]
    require_same_losses(run_chain(found, tmp_path, (NUM_STEPS, NUM_STEPS)))


def test_offloaded_optimizer(tmp_path: Path) -> None:
    stages = (1, 2, 3)
    found = [config(DP2, "llama", zero_stage=stage, offload_optimizer=True) for stage in stages]
    require_same_losses(run_chain(found, tmp_path, (NUM_STEPS, NUM_STEPS)))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_planted_mutation_is_caught(mutation: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"the layout has changed a weight|each element is written once|approx"):
        require_same_losses(run_chain([config(TP2), config({})], tmp_path, (NUM_STEPS, NUM_STEPS), mutation))
