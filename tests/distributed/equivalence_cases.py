"""Cases of the equivalence tests: models, layouts and planted faults, and how a layout and its one-rank twin are run.

`test_equivalence.py` and `test_updates.py` check the results; `write_equivalence.py` publishes the same numbers.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from megatron_lite.config.derived import all_layers, fill_in_model, resolve
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import (
    Architecture,
    Compile,
    LossScaleConfig,
    ObjectiveConfig,
    ObjectiveName,
    OptimizerConfig,
    OptimizerName,
    ParallelConfig,
    Precision,
    Recompute,
    RunConfig,
    TrainConfig,
)
from megatron_lite.config.schema import DataConfig as Data
from megatron_lite.verify.equivalence import TOLERANCE, Trace, comparable, differences, trace_twin
from tests.distributed.harness import run_ranks
from tests.distributed.layout_ranks import layout_rank, updates_rank
from tests.tiny_models import BART, BERT, GPT2, LLAMA, ROBERTA, T5, T5_V1_1

VOCAB_SIZE = 301  # a prime: no tensor-parallel size divides it
NUM_STEPS = 10
TIMEOUT_SECONDS = 120.0  # for one job of ranks
MUTATED_STEPS = 2  # a planted fault already shows in the first gradients

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
FAMILIES = {
    "GPT-2": ("gpt2", "gpt2_dropout", "prefix_lm"),
    "LLaMA": ("llama", "llama_mha", "fill_in_the_middle"),
    "BERT": ("bert", "roberta", "bert_untied", "bert_dropout"),
    "T5": ("t5", "t5_v1_1", "t5_dropout"),
    "BART": ("bart", "bart_dropout"),
}
"""The models of each family, for the published table."""
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
}  # all others use causal_lm
Z_LOSS = {"llama": 0.1, "bert": 0.1, "t5_v1_1": 0.1}
"""Weights with which the term shows in every gradient."""


def lopsided(model: str, pp: int) -> list[int]:
    """A cut that no balance gives: all layers before the last stage, most of them on the second last."""
    layers = all_layers(fill_in_model(MODELS[model]))
    return [*[1] * (pp - 2), layers - (pp - 2), 0] if pp > 1 else [layers]


def run_config(
    model: str,
    *,
    dp: int = 1,
    tp: int = 1,
    pp: int = 1,
    compiled: Compile = Compile.none,
    is_lopsided: bool = False,
    **parallel: object,
) -> ResolvedConfig:
    """A tiny run in which clipping takes effect, loss masks are uneven, and each data rank has two micro-batches (four
    with four stages).

    Not more micro-batches, because the cost of a step here is that of its collectives, most of which run once per
    micro-batch. With dropout all layouts have the same micro-batches, because masks are drawn per micro-batch.
    """
    micro_batch_size = 2 if dp > 1 or pp > 2 or "dropout" in model else 4
    if is_lopsided:
        parallel["stages"] = lopsided(model, pp)
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
        train=TrainConfig(
            steps=NUM_STEPS,
            micro_batch_size=micro_batch_size,
            global_batch_size=8,
            compile=compiled,
            head_chunk=None if dp > 1 and tp == 1 else 24,  # a micro-batch has 32 or 64 tokens: uneven chunks
        ),
    )
    return comparable(resolve(config))


# Pairs of a layout and a cut: balanced unless it says otherwise.
LAYOUTS: dict[str, dict[str, Any]] = {
    "one_rank": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
    "tp4": {"tp": 4},
    "pp4": {"pp": 4},
    "tp2_pp2": {"tp": 2, "pp": 2, "stages": "even"},
    "dp2_tp2_pp2": {"dp": 2, "tp": 2, "pp": 2},
    "zero0_dp2_pp2": {"dp": 2, "pp": 2, "zero_stage": 0, "is_lopsided": True},
    "zero2_dp2": {"dp": 2, "zero_stage": 2},
    "zero3_dp2": {"dp": 2, "zero_stage": 3},
    "zero2_dp2_tp2": {"dp": 2, "tp": 2, "zero_stage": 2},
    "zero3_dp2_tp2": {"dp": 2, "tp": 2, "zero_stage": 3},
    "offload_zero1_dp2_pp2": {"dp": 2, "pp": 2, "offload_optimizer": True, "is_lopsided": True},
    "offload_zero2_dp2": {"dp": 2, "zero_stage": 2, "offload_optimizer": True},
    "offload_zero3_dp2": {"dp": 2, "zero_stage": 3, "offload_optimizer": True},
    "sequence_parallel_tp2": {"tp": 2, "sequence_parallel": True},
    "sequence_parallel_dp2_tp2_pp2": {"dp": 2, "tp": 2, "pp": 2, "sequence_parallel": True},
    "sequence_parallel_zero3_dp2_tp2": {"dp": 2, "tp": 2, "zero_stage": 3, "sequence_parallel": True},
    "recompute_full_tp2_pp2": {"tp": 2, "pp": 2, "recompute": Recompute.full, "is_lopsided": True},
    "recompute_selective_dp2_pp2": {"dp": 2, "pp": 2, "recompute": Recompute.selective, "is_lopsided": True},
    "compiled_zero2_dp2": {"dp": 2, "zero_stage": 2, "compiled": Compile.blocks},
    "compiled_sequence_parallel_tp2_pp2": {
        "tp": 2, "pp": 2, "sequence_parallel": True, "recompute": Recompute.selective, "compiled": Compile.blocks,
    },
}  # fmt: skip
NOT_COMPILED = [layout for layout, settings in LAYOUTS.items() if "compiled" not in settings]
CASES = [(model, layout) for layout in NOT_COMPILED for model in ("gpt2", "llama")]
CASES += [("llama_mha", layout) for layout in ("tp4", "dp2_tp2_pp2")]
# Dropout masks of sharded heads cannot equal those of one rank; `comparable` turns that dropout off if TP > 1.
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
# Special features of these models (position offset after padding, untied head, gated MLP) meet each axis here, too.
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
CASES += [("gpt2_dropout", "compiled_zero2_dp2"), ("t5", "compiled_sequence_parallel_tp2_pp2")]
CASES.remove(("llama", "tp4"))  # two query groups cannot be split over four ranks: validation rejects it

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
    ("flat_gradients_not_reduced", "gpt2", "dp2"),
    ("first_micro_batch_overwritten", "llama", "tp2"),
    ("mean_of_micro_batch_means", "gpt2", "dp2"),
    ("sequence_weights_not_shared_over_data_ranks", "bert", "dp2"),
    ("replicated_parameters_counted_on_every_rank", "gpt2", "tp2"),
    ("padded_vocabulary_in_the_softmax", "gpt2", "tp2"),
    ("head_gradient_too_large", "llama", "pp2"),
    ("head_gradient_too_large", "llama", "zero3_dp2"),
]
"""Fault of `layout_ranks.planted`, model, layout."""

UPDATE_STEPS = 3
UPDATE_LAYOUTS = {
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
FP32_ALONE = ("zero0", "zero1_tp2", "zero1_pp2")  # a reference, and layouts that clip with the same code as zero1
UPDATE_CASES = [(layout, precision) for layout in UPDATE_LAYOUTS for precision in Precision if layout not in FP32_ALONE]
UPDATE_CASES += [(layout, Precision.fp32) for layout in FP32_ALONE]
# Largest relative difference of a parameter's update: half precision rounds its gradients.
UPDATE_TOLERANCES = {Precision.fp32: TOLERANCE, Precision.bf16: 0.03, Precision.fp16: 0.01}
UPDATE_MUTATION = "clip_coefficient_too_large"


@functools.cache
def twin(model: str, num_steps: int, tp_comparable: bool, sequence_parallel: bool) -> Trace:
    config = run_config(model, tp=2 if tp_comparable else 1, sequence_parallel=sequence_parallel)
    return trace_twin(config, VOCAB_SIZE, num_steps)


def traces(
    config: RunConfig,
    num_steps: int = NUM_STEPS,
    mutation: str | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> list[Trace]:
    arguments = config, VOCAB_SIZE, num_steps, mutation
    return run_ranks(layout_rank, config.topology.world_size, *arguments, timeout_seconds=timeout_seconds)


def compared(model: str, config: RunConfig, layout: list[Trace], num_steps: int = NUM_STEPS) -> dict[str, float]:
    """Relative differences between the layout and its twin, by name, largest first."""
    parallel, drops = config.parallel, "dropout" in model  # without dropout one twin serves all layouts
    reference = twin(
        model, num_steps, drops and parallel.tensor_parallel_size > 1, drops and parallel.sequence_parallel
    )
    return differences(reference, layout)


def update_config(layout: str, precision: Precision) -> ResolvedConfig:
    """SGD with momentum, weight decay of matrices and warm-up; every step is clipped."""
    config = run_config("llama", **UPDATE_LAYOUTS[layout])
    optimizer = OptimizerConfig(
        name=OptimizerName.sgd, learning_rate=1.0, warmup_steps=2, momentum=0.5, weight_decay=0.01, clip_grad_norm=0.1
    )
    train = replace(config.train, precision=precision, loss_scale=LossScaleConfig(initial_power=10))
    return replace(config, model=replace(config.model, num_layers=2), optimizer=optimizer, train=train)


@functools.cache
def update_twin() -> Trace:
    trace = trace_twin(update_config("zero1", Precision.fp32), VOCAB_SIZE, UPDATE_STEPS)
    assert min(trace.grad_norms) > 0.1, "the case would not clip"
    return trace


@functools.cache
def update_traces() -> dict[tuple[str, Precision], list[tuple[Trace, Trace]]]:
    """Every rank's traces of each case, without and with the fault. Two ranks run all cases, to start only once."""
    configs = [update_config(layout, precision) for layout, precision in UPDATE_CASES]
    ranks = run_ranks(updates_rank, 2, configs, VOCAB_SIZE, UPDATE_STEPS, UPDATE_MUTATION, timeout_seconds=600)
    return dict(zip(UPDATE_CASES, map(list, zip(*ranks, strict=True)), strict=True))


def compared_updates(layout: list[Trace]) -> dict[str, float]:
    """Relative differences between the weight updates and the twin's, largest first."""
    found = differences(update_twin(), layout)
    return {name: difference for name, difference in found.items() if name.startswith("update")}
