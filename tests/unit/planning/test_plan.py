"""The plan as the user reads it, and its figures."""

from __future__ import annotations

from unittest import mock

import pytest

from megatron_lite.config.compose import compose
from megatron_lite.config.derived import resolve
from megatron_lite.config.schema import RunConfig
from megatron_lite.planning import stages as planned_stages
from megatron_lite.planning.flops import flops_of_run
from megatron_lite.planning.memory import model_states
from megatron_lite.planning.placement import placement_warnings
from megatron_lite.planning.plan import describe
from megatron_lite.planning.stages import layer_costs, layers_of_stages

NODES = ("launcher=torchrun", "launcher.master_address=n0")


def config_of(*words: str, script: str = "pretrain_gpt") -> RunConfig:
    return resolve(compose(script, list(words)), device="cpu")


def rows(text: str) -> dict[str, str]:
    """Name -> text of the plan's one-line rows."""
    lines = [line for line in text.splitlines() if line and not line.startswith(" ")]
    return {line[:17].strip(): line[17:] for line in lines}


def test_rows_of_a_three_dimensional_layout() -> None:
    config = config_of("parallel=dp2_tp2_pp2", "train.steps=10", "train.global_batch_size=32")
    text = rows(describe(config, 8000))
    assert text["world size"] == "8 = 2 data x 2 tensor x 2 pipeline"
    assert text["layers"] == "4 = 1 stage of 4 + 1 stage of 0"
    assert text["work of stages"] == "balanced: the largest has 1.11 x the mean; with parallel.stages=even 1.55 x"
    assert text["batch"] == "32 = 4 micro x 4 micro-batches x 2 data-parallel"
    assert text["tokens"] == "4,096 a step, 40,960 in 10 steps"
    assert text["learning rate"] == (
        "0.0003 after 10 steps, then decay=cosine until step 10: half a cosine wave to min_learning_rate, without "
        "restarts (arXiv 1608.03983)"
    )
    assert text["pipeline bubble"] == "20.0% = (2 - 1) / (4 + 2 - 1) of the time"
    assert text["vocabulary"] == "8,000 padded to 8,192 = 4,096 rows x 2 tensor-parallel (multiple of 128)"
    assert text["parameters"] == (
        "1,948,416 = 4 layers of 198,272, embedding 1,024,000, positions 131,072, head tied, final norm 256; padding "
        "not counted"
    )
    assert "batch ramp" not in text


def test_whose_model_the_checkpoints_hold() -> None:
    assert rows(describe(config_of(), 8000))["checkpoints"] == "folders of transformers' GPT2LMHeadModel"
    bert = rows(describe(config_of(script="pretrain_bert"), 8000))
    assert bert["checkpoints"] == "folders of transformers' BertForPreTraining"
    mixed = rows(describe(config_of("model.normalization=rmsnorm", "model.mlp_bias=false"), 8000))
    assert mixed["checkpoints"] == (
        "under our own names: GPT2LMHeadModel of transformers has layernorm for model.normalization=rmsnorm, and true "
        "for model.mlp_bias=false"
    )


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


def test_rank_grid_names_the_node_of_every_tensor_parallel_group() -> None:
    text = describe(config_of("parallel=dp2_tp2_pp2", *NODES, "launcher.nodes=4"), 8000)
    assert rows(text)["nodes"] == "4 of 2 ranks each"
    assert "warning" not in text
    assert text.endswith(
        "  pp1      tp0   tp1\n"
        "    dp0       4     5   node 2\n"
        "    dp1       6     7   node 3"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        (
            ["parallel=dp1_tp4_pp2", "launcher.nodes=4"],
            "parallel.tensor_parallel_size=4 crosses nodes of launcher.processes_per_node=2: the all-reduces of every "
            "layer go over the network; use parallel.tensor_parallel_size=2 with parallel.pipeline_parallel_size=4, or "
            "a launcher.processes_per_node that 4 divides",
        ),
        (
            ["parallel=dp1_tp4_pp4", "launcher.nodes=8"],  # 8 stages would be more than the 4 layers
            "parallel.tensor_parallel_size=4 crosses nodes of launcher.processes_per_node=2: the all-reduces of every "
            "layer go over the network; use parallel.tensor_parallel_size=2, or a launcher.processes_per_node that 4 "
            "divides",
        ),
        (["parallel=dp2_tp4_pp1", "launcher.nodes=2"], None),
        (["parallel=dp2_tp4_pp1", "launcher.nodes=1"], None),
        (["parallel=dp4_tp1_pp2", "launcher.nodes=2"], None),  # replicas and stages may cross nodes
    ],
)
def test_tensor_parallel_group_that_crosses_nodes_is_warned_of(words: list[str], warning: str | None) -> None:
    config = config_of(*NODES, *words)
    here = config.processes_per_node
    crosses = any(len({rank // here for rank in group}) > 1 for group in config.topology.tensor_groups())
    assert crosses is (warning is not None), "the case itself"
    assert placement_warnings(config) == ([warning] if warning else [])
    assert describe(config, 8000).count("warning: ") == int(crosses)


def test_large_grid_on_nodes_is_abbreviated() -> None:
    text = describe(config_of("experiment=gpt3_175b", *NODES, "launcher.nodes=384"), 50257)
    assert "  pp63  ranks 3024 to 3071: dp0-5, tp0-7   nodes 378-383" in text


def test_large_grid_is_abbreviated() -> None:
    text = describe(config_of("experiment=gpt3_175b"), 50257)
    assert "  pp0   ranks 0 to 47: dp0-5, tp0-7" in text
    assert "  pp63  ranks 3024 to 3071: dp0-5, tp0-7" in text
    assert rows(text)["layers"] == "96 = 31 stages of 1 + 32 stages of 2 + 1 stage of 1"
    assert "  stage 0: embedding, positions, 1 layer;" in text
    assert "  stage 63: 1 layer, final norm, head;" in text


def test_batch_ramp_row() -> None:
    config = config_of("train.batch_ramp={start:8,increment:8,samples:1000}")
    assert rows(describe(config, 8000))["batch ramp"] == (
        "8 to 32 by 8: 4 sizes over 1,000 samples; first 8 = 4 micro x 2 micro-batches x 1 data-parallel"
    )


def stages(text: str) -> list[str]:
    """What lies on each stage and how many parameters a rank of it holds."""
    return [line.partition(" = weights")[0].rpartition(";")[0].strip() for line in text.splitlines()
            if line.startswith("  stage ")]  # fmt: skip


T5_WORDS = (
    "model=t5_small",
    "model.num_layers=4",
    "model.num_decoder_layers=4",
    "model.hidden_size=128",
    "model.num_attention_heads=4",
    "model.head_size=32",
    "model.ffn_hidden_size=512",
)
"""A T5 v1.0 of four layers in each stack."""


def test_both_stacks_on_one_pipeline() -> None:
    config = config_of(*T5_WORDS, "parallel=dp1_tp2_pp3", "parallel.stages=even", script="pretrain_t5")
    text = describe(config, 8192)
    assert rows(text)["layers"] == "8 = 4 encoder + 4 decoder = 2 stages of 3 + 1 stage of 2"
    assert rows(text)["tokens"] == "5,024 a step, 1,507,200 in 300 steps"  # 32 x (128 + 29)
    assert rows(text)["parameters"] == (
        "2,886,656 = 4 encoder layers of 196,864, 4 decoder layers of 262,528, embedding 1,048,576, relative positions "
        "256, head tied, final norms 256; padding not counted"
    )
    assert rows(text)["FLOPs per token"].endswith(
        "scores of both stacks 2.19e+05 + projection 1.31e+05 + cross-attention 3.11e+05 + mlp 1.05e+06 + "
        "head 3.87e+05)"
    )
    assert stages(text) == [
        "stage 0: embedding, 3 encoder layers; 820,032 parameters a rank",
        "stage 1: 1 encoder layer, encoder's final norm, decoder embedding (copy), 2 decoder layers; 886,016 "
        "parameters a rank",
        "stage 2: 2 decoder layers, final norm, head; 787,392 parameters a rank",
    ]


def test_bert_with_its_heads() -> None:
    text = describe(config_of("parallel=pp2", "parallel.stages=[2,2]", script="pretrain_bert"), 8192)
    assert rows(text)["parameters"] == (
        "2,014,978 = 4 layers of 198,272, embedding 1,048,576, positions 131,072, segments 256, embedding norm 256, "
        "head transform 16,768, head tied, head bias 8,192, pooler and next-sentence head 16,770; padding not counted"
    )
    assert stages(text) == [
        "stage 0: embedding, positions, segments, 2 layers; 1,576,704 parameters a rank",
        "stage 1: 2 layers, head, pooler and next-sentence head; 1,486,850 parameters a rank",
    ]


@pytest.mark.parametrize(
    ("script", "words", "expected"),
    [
        ("pretrain_gpt", [], "causal_lm: 128 positions; each predicts the next token"),
        (
            "pretrain_gpt",
            ["objective=prefix_lm"],
            "prefix_lm: 128 positions; 64.5 of them on average, behind a prefix, predict the next token",
        ),
        (
            "pretrain_gpt",
            ["objective=fill_in_the_middle"],
            "fill_in_the_middle: 128 positions; each predicts the next token; 50% of the documents are rearranged, 50% "
            "of these with the suffix first",
        ),
        (
            "pretrain_bert",
            ["objective=masked_lm", "objective.whole_word=true"],
            "masked_lm: 128 positions; 19.2 of them predict masked whole words (0.15 x 128: 80% masks, 10% random, 10% "
            "kept)",
        ),
        (
            "pretrain_bert",
            ["data.seq_length=512"],
            "masked_lm_nsp: 512 positions; 76.8 of them predict masked tokens (0.15 x 512: 80% masks, 10% random, 10% "
            "kept), and one whether the parts follow each other (50% do)",
        ),
        (
            "pretrain_t5",
            ["data.seq_length=512"],
            "span_corruption: 512 encoder x 114 decoder positions; 85 of 568 tokens are predicted (15.0%), in 28 spans",
        ),
        (
            "pretrain_t5",
            ["objective=bart_denoising"],
            "bart_denoising: 128 encoder x 128 decoder positions; the decoder predicts the whole text; 30% of the "
            "input is masked in spans of 3 on average, its sentences are shuffled",
        ),
        (
            "pretrain_t5",
            ["objective=ul2"],
            "ul2: 128 encoder x 64 decoder positions; 43.43 of the decoder's on average predict what denoisers took "
            "out (R 29%, S 14%, X 57%), with mode tokens",
        ),
    ],
)
def test_objective_row(script: str, words: list[str], expected: str) -> None:
    assert rows(describe(config_of(*words, script=script), 8192))["objective"] == expected


def test_unknown_vocabulary_is_a_letter() -> None:
    text = describe(config_of("model=llama_tiny", "parallel=tp2"), None)
    assert rows(text)["vocabulary"] == "v, known once the data is prepared (model.vocab_size=null)"
    assert rows(text)["parameters"] == (
        "787,584 + v x 256 = 4 layers of 196,864, embedding v x 128, head v x 128, final norm 128; padding not counted"
    )
    assert rows(text)["FLOPs per token"] == "5.115e+06 + v x 7.680e+02"
    assert "compute" not in rows(text)
    assert "  stage 0: embedding, 4 layers, final norm, head; 394,368 + v/2 x 256 parameters a rank" in text


@pytest.mark.parametrize("words", [["experiment=t5_base"], ["model=t5_v1_1_base"], ["experiment=bart_base"]])
def test_letter_stands_for_the_known_figure(words: list[str]) -> None:
    """`a + v x b` at a vocabulary gives what the plan prints for that vocabulary."""
    config = config_of(*words, script="pretrain_t5")
    symbolic = rows(describe(config, None))["parameters"].partition(" = ")[0].replace(",", "")
    known = rows(describe(config, 32000))["parameters"].partition(" = ")[0].replace(",", "")
    constant, _, slope = symbolic.partition(" + v x ")
    assert int(constant) + 32000 * int(slope) == int(known)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        # fp32 reference: weights, gradients and two moments, all whole
        (["parallel.zero_stage=0"], (4, 4, 8)),
        # ZeRO-1 in fp32 over 4 ranks: a master copy and two moments, shared
        ([], (4, 4, 12 / 4)),
        (["train.precision=bf16"], (2, 4, 12 / 4)),  # summed in fp32 by the matrix products
        # ... and those of the last backward pass where they are not
        (["train.precision=bf16", "train.compile=blocks"], (2, 4 + 2, 12 / 4)),
        (["train.precision=bf16", "parallel.zero_stage=2"], (2, 4 / 4, 12 / 4)),
        (["train.precision=bf16", "parallel.zero_stage=3"], (2 / 4, 4 / 4, 12 / 4)),
        (["optimizer=sgd"], (4, 4, 8 / 4)),
        (["optimizer=adafactor"], (4, 4, 0)),
    ],
)
def test_bytes_per_parameter(words: list[str], expected: tuple[float, float, float]) -> None:
    states = model_states(config_of(*words), parameters=1000, data_parallel_size=4)
    assert (states.weights / 1000, states.gradients / 1000, states.optimizer / 1000) == expected


def cut_of(*words: str, vocab_size: int | None = 8192, script: str = "pretrain_gpt") -> list[int]:
    return layers_of_stages(config_of("parallel=pp2", *words, script=script), vocab_size)


DEEP = ("model.num_layers=12",)


def test_each_part_of_the_work_moves_the_cut() -> None:
    """Twelve layers on two stages: a larger vocabulary, longer inputs and recomputation move layers."""
    assert cut_of(*DEEP, "parallel.stages=even") == cut_of(*DEEP, vocab_size=128) == [6, 6]
    assert cut_of(*DEEP) == [8, 4]
    assert cut_of(*DEEP, vocab_size=30_000) == [12, 0]
    assert cut_of(*DEEP, vocab_size=16_384) == [11, 1]
    assert cut_of(*DEEP, "parallel.recompute=full", vocab_size=16_384) == [10, 2]
    long = ("data.seq_length=4096", "model.max_position_embeddings=4096")
    assert cut_of(*DEEP, *long)[0] < 8
    assert cut_of(*DEEP, "parallel.stages=[0,12]") == [0, 12]


def test_decoder_layers_cost_their_cross_attention() -> None:
    """Six encoder and six decoder layers over equal lengths: half of the work is before the decoder's middle."""
    words = ("objective=bart_denoising", "model.num_layers=6", "model.num_decoder_layers=6")
    assert cut_of(*words, vocab_size=300, script="pretrain_t5")[0] > 6


def test_a_plan_without_vocabulary_says_for_which_one_it_cuts() -> None:
    config = config_of("parallel=pp2")
    assert rows(describe(config, None))["work of stages"].endswith("; at v = 50,000, and cut again once v is known")
    assert layers_of_stages(config, None) == layers_of_stages(config, 50_000)


def test_every_layer_of_the_plan_is_work() -> None:
    """The FLOPs of all stages are those of the model, besides element-wise work: 3 x forward, 4 x if recomputed."""
    for words, passes in (((), 3), (("parallel.recompute=full",), 4)):
        config = config_of(*words)
        terms, tokens = flops_of_run(config, 8192), config.train.micro_batch_size * 128
        with mock.patch.object(planned_stages, "ELEMENT_FLOPS", 0):
            costs = layer_costs(config, 8192)
        assert sum(costs.work) == pytest.approx(passes * (terms.forward - terms.head) * tokens)
        assert (costs.first_work, costs.last_work) == (0, pytest.approx(3 * terms.head * tokens))
