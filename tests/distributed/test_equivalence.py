"""The claim of the project: the layout changes nothing but speed.

Every layout trains on the same samples as a bare one-rank torch loop. Compared within 1e-5, relative, in fp32: each
parameter's raw gradient before clipping, the global gradient norm and the loss of ten steps.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from megatron_lite.config.derived import resolve
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import (
    Architecture,
    ObjectiveConfig,
    ObjectiveName,
    OptimizerConfig,
    OptimizerName,
    ParallelConfig,
    Recompute,
    RunConfig,
    TrainConfig,
)
from megatron_lite.config.schema import DataConfig as Data
from megatron_lite.verify.equivalence import TOLERANCE, Trace, comparable, differences, trace_twin
from tests.distributed.harness import run_ranks
from tests.distributed.layout_ranks import AUXILIARY_OF_BLOCKS, AUXILIARY_UNLISTED, layout_rank, planted
from tests.tiny_models import BART, BERT, GPT2, LLAMA, ROBERTA, T5, T5_V1_1

VOCAB_SIZE = 301  # a prime: no tensor-parallel size divides it
NUM_STEPS = 10
MUTATED_STEPS = 2  # a planted fault shows in the first gradients already

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1}
DEEP = {"num_layers": 4}  # one layer for each of four stages; encoder-decoders have as many, or five
MODELS = {
    "gpt2": replace(GPT2, **DEEP),
    "llama": replace(LLAMA, **DEEP, num_query_groups=2),
    "llama_mha": replace(LLAMA, **DEEP, tie_embeddings=True),
    "gpt2_dropout": replace(GPT2, **DEEP, **DROPOUT),
    "bert": replace(BERT, **DEEP),
    "roberta": replace(ROBERTA, **DEEP),
    "bert_untied": replace(BERT, **DEEP, tie_embeddings=False),
    "bert_dropout": replace(BERT, **DEEP, **DROPOUT),
    "t5": T5,
    "t5_v1_1": T5_V1_1,
    "t5_dropout": replace(T5, **DROPOUT, ffn_dropout=0.1, final_dropout=0.1),
    "bart": replace(BART, num_layers=1),
    "bart_dropout": replace(BART, **DROPOUT, num_layers=1),
    "prefix_lm": replace(GPT2, **DEEP),
    "fill_in_the_middle": replace(LLAMA, **DEEP, num_query_groups=2),
}
OBJECTIVES = {
    "bert": ObjectiveName.masked_lm_nsp,
    "roberta": ObjectiveName.masked_lm,
    "bert_untied": ObjectiveName.masked_lm_nsp,
    "bert_dropout": ObjectiveName.masked_lm_nsp,
    "t5": ObjectiveName.span_corruption,
    "t5_v1_1": ObjectiveName.ul2,
    "t5_dropout": ObjectiveName.span_corruption,
    "bart": ObjectiveName.bart_denoising,
    "bart_dropout": ObjectiveName.bart_denoising,
    "prefix_lm": ObjectiveName.prefix_lm,
    "fill_in_the_middle": ObjectiveName.fill_in_the_middle,
}  # of the others: causal_lm
Z_LOSS = {"llama": 0.1, "bert": 0.1, "t5_v1_1": 0.1}
"""Weights with which the term shows in every gradient."""


def run_config(model: str, *, dp: int = 1, tp: int = 1, pp: int = 1, **parallel: object) -> ResolvedConfig:
    """A tiny run with clipping that bites, uneven loss masks and two micro-batches a data rank, four with four stages.

    Not more of them: a step's cost here is that of its collectives, most of which come with each micro-batch. Only
    dropout, whose masks are drawn for a micro-batch, has equal ones in every layout.
    """
    micro_batch_size = 2 if dp > 1 or pp > 2 or "dropout" in model else 4
    config = RunConfig(
        model=MODELS[model],
        objective=ObjectiveConfig(name=OBJECTIVES.get(model, ObjectiveName.causal_lm)),
        parallel=ParallelConfig(data_parallel_size=dp, tensor_parallel_size=tp, pipeline_parallel_size=pp, **parallel),
        data=Data(seq_length=24 if MODELS[model].architecture is Architecture.encoder_decoder else 16),
        optimizer=OptimizerConfig(
            learning_rate=1e-3,
            min_learning_rate=1e-4,
            warmup_steps=2,
            clip_grad_norm=0.5,
            z_loss_weight=Z_LOSS.get(model, 0.0),
        ),
        train=TrainConfig(steps=NUM_STEPS, micro_batch_size=micro_batch_size, global_batch_size=8),
    )
    return comparable(resolve(config))


LAYOUTS = {
    "one_rank": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
    "tp4": {"tp": 4},
    "pp4": {"pp": 4},
    "tp2_pp2": {"tp": 2, "pp": 2},
    "dp2_tp2_pp2": {"dp": 2, "tp": 2, "pp": 2},
    "zero0_dp2_pp2": {"dp": 2, "pp": 2, "zero_stage": 0},
    "zero2_dp2": {"dp": 2, "zero_stage": 2},
    "zero3_dp2": {"dp": 2, "zero_stage": 3},
    "zero2_dp2_tp2": {"dp": 2, "tp": 2, "zero_stage": 2},
    "zero3_dp2_tp2": {"dp": 2, "tp": 2, "zero_stage": 3},
    "offload_zero1_dp2_pp2": {"dp": 2, "pp": 2, "offload_optimizer": True},
    "offload_zero2_dp2": {"dp": 2, "zero_stage": 2, "offload_optimizer": True},
    "offload_zero3_dp2": {"dp": 2, "zero_stage": 3, "offload_optimizer": True},
    "sequence_parallel_tp2": {"tp": 2, "sequence_parallel": True},
    "sequence_parallel_dp2_tp2_pp2": {"dp": 2, "tp": 2, "pp": 2, "sequence_parallel": True},
    "sequence_parallel_zero3_dp2_tp2": {"dp": 2, "tp": 2, "zero_stage": 3, "sequence_parallel": True},
    "recompute_full_tp2_pp2": {"tp": 2, "pp": 2, "recompute": Recompute.full},
    "recompute_selective_dp2_pp2": {"dp": 2, "pp": 2, "recompute": Recompute.selective},
}
CASES = [(model, layout) for layout in LAYOUTS for model in ("gpt2", "llama")]
CASES += [("llama_mha", layout) for layout in ("tp4", "dp2_tp2_pp2")]
# Masks of heads that are sharded cannot be those of one rank; `comparable` drops that dropout where TP > 1.
CASES += [
    ("gpt2_dropout", layout)
    for layout in (
        "dp2",
        "pp2",
        "zero2_dp2",
        "zero3_dp2",
        "recompute_full_tp2_pp2",
        "recompute_selective_dp2_pp2",
        "dp2_tp2_pp2",
    )
]
EVERY_AXIS = (
    "tp2",
    "pp2",
    "pp4",
    "dp2",
    "dp2_tp2_pp2",
    "zero2_dp2",
    "zero3_dp2_tp2",
    "sequence_parallel_dp2_tp2_pp2",
    "recompute_full_tp2_pp2",
)
CASES += [(model, layout) for model in ("bert", "t5", "bart") for layout in EVERY_AXIS]
# What these have of their own (positions behind the padding's; an untied head, a gated MLP) meets each axis here, too.
OWN_PARTS = ("tp2", "pp4", "dp2_tp2_pp2", "zero3_dp2_tp2", "sequence_parallel_dp2_tp2_pp2")
CASES += [(model, layout) for model in ("roberta", "t5_v1_1") for layout in OWN_PARTS]
CASES += [("bert_untied", layout) for layout in ("pp2", "zero3_dp2_tp2")]
CASES += [(model, layout) for model in ("bert_dropout", "t5_dropout") for layout in ("dp2", "pp4", "dp2_tp2_pp2")]
CASES += [(model, "recompute_selective_dp2_pp2") for model in ("bert_dropout", "t5_dropout", "bart_dropout")]
CASES += [("bart_dropout", "pp4"), ("t5_dropout", "zero3_dp2_tp2"), ("t5_dropout", "sequence_parallel_tp2")]
CASES += [
    (model, layout)
    for model in ("prefix_lm", "fill_in_the_middle")
    for layout in ("pp4", "dp2_tp2_pp2", "zero3_dp2", "sequence_parallel_tp2")
]
NOT_FOR_GROUPS = {("llama", "tp4")}  # two query groups cannot be split over four ranks: refused by the validation


@functools.cache
def twin(model: str, num_steps: int, tp_comparable: bool, sequence_parallel: bool) -> Trace:
    config = run_config(model, tp=2 if tp_comparable else 1, sequence_parallel=sequence_parallel)
    return trace_twin(config, VOCAB_SIZE, num_steps)


def world_size(config: ResolvedConfig) -> int:
    return config.topology.world_size


def traces(config: RunConfig, num_steps: int = NUM_STEPS, mutation: str | None = None) -> list[Trace]:
    return run_ranks(layout_rank, world_size(config), config, VOCAB_SIZE, num_steps, mutation)


def worst(model: str, config: RunConfig, layout: list[Trace], num_steps: int = NUM_STEPS) -> tuple[str, float]:
    parallel, drops = config.parallel, "dropout" in model  # without dropout one twin serves all layouts
    reference = twin(
        model, num_steps, drops and parallel.tensor_parallel_size > 1, drops and parallel.sequence_parallel
    )
    return next(iter(differences(reference, layout).items()))


@pytest.mark.parametrize(("model", "layout"), [case for case in CASES if case not in NOT_FOR_GROUPS])
def test_layout_equals_one_rank(model: str, layout: str) -> None:
    config = run_config(model, **LAYOUTS[layout])
    what, difference = worst(model, config, traces(config))
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
    """Stages between the first and the last see no batch, and must follow the ramp all the same."""
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
    """A term of the loss in each block, on each stage; a mean and a largest value of the whole job."""
    config = run_config("gpt2")
    with planted(AUXILIARY_OF_BLOCKS):
        reference = trace_twin(config, VOCAB_SIZE, MUTATED_STEPS)
    assert len(reference.measures[0]) == 2
    layout_of_blocks = traces(run_config("gpt2", **LAYOUTS[layout]), MUTATED_STEPS, AUXILIARY_OF_BLOCKS)
    what, difference = next(iter(differences(reference, layout_of_blocks).items()))
    assert difference <= TOLERANCE, f"{what} differs by {difference:.1e}"
    without, bias = trace_twin(config, VOCAB_SIZE, 1), "layers.0.mlp.down.bias"
    assert (without.gradients[bias] - reference.gradients[bias]).norm() > 0.01 * without.gradients[bias].norm()


def test_a_measure_that_is_not_listed_is_named() -> None:
    with pytest.raises(Exception, match=r"block_\w+ was measured but is not listed; add it to STEP_MEASURES"):
        traces(run_config("gpt2"), 1, AUXILIARY_UNLISTED)


MUTATIONS = [
    ("row_parallel_without_all_reduce", "gpt2", "tp2"),
    ("column_parallel_without_backward_all_reduce", "gpt2", "tp2"),
    ("column_parallel_without_backward_all_reduce", "bart", "tp2"),
    ("tied_gradient_doubled", "gpt2", "pp2"),
    ("tied_gradient_not_summed", "gpt2", "pp2"),
    ("tied_gradient_not_summed", "t5_v1_1", "pp2"),
    ("relative_bias_gradient_not_summed", "t5", "pp4"),
    ("norm_gradient_not_summed_under_sequence_parallel", "gpt2", "sequence_parallel_tp2"),
    ("replicated_linear_gradient_not_summed_under_sequence_parallel", "bert", "sequence_parallel_tp2"),
    ("first_position_gradient_on_every_rank", "bert", "sequence_parallel_tp2"),
    ("memory_gradient_lost_between_stages", "t5", "pp4"),
    ("data_parallel_gradients_not_reduced", "gpt2", "zero0_dp2_pp2"),
    ("mean_of_micro_batch_means", "gpt2", "dp2"),
    ("sequence_weights_not_shared_over_data_ranks", "bert", "dp2"),
    ("replicated_parameters_counted_on_every_rank", "gpt2", "tp2"),
    ("padded_vocabulary_in_the_softmax", "gpt2", "tp2"),
    ("auxiliary_gradient_too_large", "llama", "pp2"),
    ("auxiliary_gradient_too_large", "llama", "zero3_dp2"),
]


@pytest.mark.parametrize(("mutation", "model", "layout"), MUTATIONS)
def test_planted_mutation_is_caught(mutation: str, model: str, layout: str) -> None:
    config = run_config(model, **LAYOUTS[layout])
    what, difference = worst(model, config, traces(config, MUTATED_STEPS, mutation), MUTATED_STEPS)
    assert difference > 10 * TOLERANCE, f"{mutation} went unnoticed: {what} differs by {difference:.1e}"
