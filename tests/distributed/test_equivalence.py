"""The claim of the project: the layout changes only the speed.

Every layout trains on the same samples as a plain one-rank torch loop. Compared in fp32, with a relative tolerance of
1e-5: each parameter's raw gradient before clipping, and the global gradient norm and the loss of ten steps.
`make equivalence` writes the numbers to docs/equivalence.md.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_lite.config.schema import OptimizerName
from megatron_lite.verify.equivalence import TOLERANCE, differences, trace_twin
from tests.distributed.equivalence_cases import (
    CASES,
    LAYOUTS,
    MUTATED_STEPS,
    MUTATIONS,
    NUM_STEPS,
    VOCAB_SIZE,
    compared,
    run_config,
    traces,
)
from tests.distributed.layout_ranks import (
    AUXILIARY_OF_BLOCKS,
    AUXILIARY_TOO_LARGE,
    AUXILIARY_UNLISTED,
    SCATTERED,
    planted,
)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_layout_equals_one_rank(model: str, layout: str) -> None:
    config = run_config(model, **LAYOUTS[layout])
    what, difference = next(iter(compared(model, config, traces(config)).items()))
    assert difference <= TOLERANCE, f"{what} differs by {difference:.1e}"


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_clipping_is_by_the_whole_models_norm(clip: float) -> None:
    config = run_config("gpt2", dp=2, pp=2)
    config = replace(config, optimizer=replace(config.optimizer, clip_grad_norm=clip))
    reference = trace_twin(config, VOCAB_SIZE, NUM_STEPS)
    assert min(reference.grad_norms) > 0.5, "the case would not clip"
    what, difference = next(iter(differences(reference, traces(config)).items()))
    assert difference <= TOLERANCE, f"{what} differs by {difference:.1e}"


@pytest.mark.parametrize("optimizer", [OptimizerName.sgd, OptimizerName.adafactor])
def test_other_optimizers(optimizer: OptimizerName) -> None:
    config = run_config("llama", dp=2, tp=2, pp=2, zero_stage=0 if optimizer is OptimizerName.adafactor else 1)
    config = replace(config, optimizer=replace(config.optimizer, name=optimizer))
    reference = trace_twin(config, VOCAB_SIZE, NUM_STEPS)
    what, difference = next(iter(differences(reference, traces(config)).items()))
    assert difference <= TOLERANCE, f"{what} differs by {difference:.1e}"


@pytest.mark.parametrize("layout", ["pp4", "zero2_dp2"])
def test_batch_ramp(layout: str) -> None:
    """Stages between the first and the last get no batch, but must follow the ramp all the same."""
    config = run_config("gpt2", **LAYOUTS[layout])
    ramp = replace(config.train.batch_ramp, start=4, increment=4, samples=12)
    config = replace(config, train=replace(config.train, batch_ramp=ramp))
    what, difference = next(iter(differences(trace_twin(config, VOCAB_SIZE, NUM_STEPS), traces(config)).items()))
    assert difference <= TOLERANCE, f"{what} differs by {difference:.1e}"


@pytest.mark.parametrize(
    "layout",
    [
        "pp4",
        "zero0_dp2_pp2",
        "zero3_dp2_tp2",
        "zero2_dp2",
        "sequence_parallel_dp2_tp2_pp2",
        "recompute_full_tp2_pp2",
        "offload_zero1_dp2_pp2",
    ],
)
def test_auxiliary_losses_and_measures_of_layers(layout: str) -> None:
    """Each block, on each stage, adds a loss term; its mean and its maximum over the whole job are measured."""
    config = run_config("gpt2")
    with planted(AUXILIARY_OF_BLOCKS):
        reference = trace_twin(config, VOCAB_SIZE, MUTATED_STEPS)
    assert len(reference.measures[0]) == 2
    layout_of_blocks = traces(run_config("gpt2", **LAYOUTS[layout]), MUTATED_STEPS, AUXILIARY_OF_BLOCKS)
    what, difference = next(iter(differences(reference, layout_of_blocks).items()))
    assert difference <= TOLERANCE, f"{what} differs by {difference:.1e}"
    without, bias = trace_twin(config, VOCAB_SIZE, 1), "layers.0.mlp.down.bias"
    assert (without.gradients[bias] - reference.gradients[bias]).norm() > 0.01 * without.gradients[bias].norm()


@pytest.mark.parametrize("layout", ["pp2", "zero3_dp2"])
def test_auxiliary_losses_of_layers_that_are_5_percent_too_large_are_caught(layout: str) -> None:
    with planted(AUXILIARY_OF_BLOCKS):
        reference = trace_twin(run_config("gpt2"), VOCAB_SIZE, MUTATED_STEPS)
    too_large = traces(run_config("gpt2", **LAYOUTS[layout]), MUTATED_STEPS, AUXILIARY_TOO_LARGE)
    what, difference = next(iter(differences(reference, too_large).items()))
    assert difference > 10 * TOLERANCE, f"it went unnoticed: {what} differs by {difference:.1e}"


def test_each_rank_needs_its_own_partition_of_the_gradients_only() -> None:
    """GPUs reduce-scatter: norm, clipping, update and the reading of gradients work with a rank's own partition."""
    config = run_config("gpt2", dp=2, tp=2)
    what, difference = next(iter(compared("gpt2", config, traces(config, NUM_STEPS, SCATTERED)).items()))
    assert difference <= TOLERANCE, f"{what} differs by {difference:.1e}"


def test_a_measure_that_is_not_listed_is_named() -> None:
    with pytest.raises(Exception, match=r"block_\w+ was measured but is not listed; add it to STEP_MEASURES"):
        traces(run_config("gpt2"), 1, AUXILIARY_UNLISTED)


@pytest.mark.parametrize(("mutation", "model", "layout"), MUTATIONS)
def test_planted_mutation_is_caught(mutation: str, model: str, layout: str) -> None:
    config = run_config(model, **LAYOUTS[layout])
    found = compared(model, config, traces(config, MUTATED_STEPS, mutation), MUTATED_STEPS)
    what, difference = next(iter(found.items()))
    assert difference > 10 * TOLERANCE, f"{mutation} went unnoticed: {what} differs by {difference:.1e}"
