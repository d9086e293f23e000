"""The cases of the rehearsal: one value of each axis, so that every pair of values that may occur together does.

`cases.yaml` lists them; `python -m tests.rehearsal.cases` adds rows for pairs that it lacks,
such as those of a new value of an axis.
"""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import yaml

from megatron_lite.config.derived import resolve
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import (
    Architecture,
    DataConfig,
    LossScaleConfig,
    ModelConfig,
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
from tests.tiny_models import BART, BERT, GPT2, LLAMA, ROBERTA, T5, T5_V1_1

FILE = Path(__file__).with_name("cases.yaml")
VOCAB_SIZE = 1009  # a prime: no tensor-parallel size divides it
LENGTH = 96
MICRO_BATCHES = 2  # of each data-parallel rank in a step
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1}
MODELS: dict[str, ModelConfig] = {
    "gpt2": GPT2,
    "llama": replace(LLAMA, num_query_groups=2),
    "bert": BERT,
    "roberta": ROBERTA,
    "t5": T5,
    "t5_v1_1": T5_V1_1,
    "bart": BART,
}
_LEFT_TO_RIGHT = ("causal_lm", "prefix_lm", "fill_in_the_middle")
OBJECTIVES = {
    "gpt2": _LEFT_TO_RIGHT,
    "llama": _LEFT_TO_RIGHT,
    "bert": ("masked_lm_nsp", "masked_lm"),
    "roberta": ("masked_lm",),
    "t5": ("span_corruption", "ul2"),
    "t5_v1_1": ("span_corruption", "ul2"),
    "bart": ("bart_denoising",),
}
"""What each family is trained on."""
AXES: dict[str, tuple[str, ...]] = {
    "family": tuple(MODELS),
    "objective": tuple(str(name) for name in ObjectiveName),
    "zero": ("0", "1", "2", "3"),
    "offload": ("no", "yes"),
    "precision": ("fp32", "bf16", "fp16"),
    "tensor": ("tp1", "tp2", "tp2_sp"),
    "stage": ("whole", "first", "middle", "last"),  # which of the pipeline's stages
    "data": ("dp1", "dp2"),
    "recompute": tuple(str(one) for one in Recompute),
    "dropout": ("no", "yes"),
    "optimizer": ("adamw", "adafactor"),
}
SCRIPTS = {
    Architecture.decoder: "pretrain_gpt",
    Architecture.encoder: "pretrain_bert",
    Architecture.encoder_decoder: "pretrain_t5",
}
Case = Mapping[str, str]
"""A value of each axis."""
Pair = frozenset[tuple[str, str]]


def allowed(case: Case) -> bool:
    """Whether these values, of some or all axes, may occur together."""
    forbidden: tuple[dict[str, Sequence[str]], ...] = (
        {"zero": "23", "stage": ("first", "middle", "last")},  # gradients are partitioned in the backward pass
        {"zero": "0", "precision": ("bf16", "fp16")},  # DeepSpeed's half precision needs ZeRO
        {"zero": "0", "offload": ("yes",)},
        {"zero": "123", "optimizer": ("adafactor",)},  # which ZeRO's flat vectors leave no rows and columns
    )
    if "family" in case and "objective" in case and case["objective"] not in OBJECTIVES[case["family"]]:
        return False
    return not any(all(case.get(axis) in tuple(values) for axis, values in rule.items()) for rule in forbidden)


def completions(case: Case, draw: random.Random) -> Iterator[dict[str, str]]:
    """All allowed cases that contain these values, in random order."""
    if not allowed(case):
        return
    axis = next((name for name in AXES if name not in case), None)
    if axis is None:
        yield dict(case)
        return
    for value in draw.sample(AXES[axis], len(AXES[axis])):
        yield from completions({**case, axis: value}, draw)


def pairs_of(case: Case) -> set[Pair]:
    return {frozenset(pair) for pair in combinations(case.items(), 2)}


def possible_pairs() -> set[Pair]:
    """All pairs of values that some case contains."""
    values = [(axis, value) for axis, found in AXES.items() for value in found]
    pairs = (pair for pair in combinations(values, 2) if pair[0][0] != pair[1][0])
    draw = random.Random(0)
    return {frozenset(pair) for pair in pairs if next(completions(dict(pair), draw), None)}


def missing_pairs(cases: Sequence[Case]) -> set[Pair]:
    return possible_pairs().difference(*map(pairs_of, cases))


def extended(cases: Sequence[Case], tries: int = 200) -> list[Case]:
    """These cases, and more until no pair is missing: each time the best of some random ones (AETG, Cohen 1997)."""
    found, draw = list(cases), random.Random(0)
    missing = missing_pairs(found)
    while missing:
        seeds = [dict(draw.choice(sorted(missing, key=sorted))) for _ in range(tries)]
        best = max((_greedy(seed, missing, draw) for seed in seeds), key=lambda one: len(pairs_of(one) & missing))
        found.append(best)
        missing -= pairs_of(best)
    return found


def _greedy(seed: Case, missing: set[Pair], draw: random.Random) -> Case:
    """Complete a case value by value, each time with the one that covers the most missing pairs."""
    case = dict(seed)
    for axis in draw.sample(list(AXES), len(AXES)):
        if axis in case:
            continue
        choices = [v for v in AXES[axis] if next(completions({**case, axis: v}, draw), None)]
        gain = {v: sum(frozenset({(axis, v), old}) in missing for old in case.items()) for v in choices}
        case[axis] = max(draw.sample(choices, len(choices)), key=lambda v: gain[v])
    return {axis: case[axis] for axis in AXES}


def read_cases() -> dict[str, Case]:
    """The cases of the file, by name."""
    rows = yaml.safe_load(FILE.read_text()) if FILE.exists() else []
    cases = [dict(zip(AXES, row.split(), strict=True)) for row in rows]
    return {name_of(case): case for case in cases}


def name_of(case: Case) -> str:
    """`gpt2-causal_lm-zero1-bf16-tp2_sp-dp2-first-full-dropout`: what is as usual is left out."""
    usual = {"tensor": "tp1", "stage": "whole", "data": "dp1", "recompute": "none", "optimizer": "adamw"}
    words = {**case, "zero": f"zero{case['zero']}", "offload": "offload", "dropout": "dropout"}
    skipped = {axis for axis, value in usual.items() if case[axis] == value}
    skipped |= {axis for axis in ("offload", "dropout") if case[axis] == "no"}
    return "-".join(words[axis] for axis in AXES if axis not in skipped)


def config_of(case: Case) -> ResolvedConfig:
    """A tiny run of this case; every stage has one layer (an encoder-decoder without stages: one of each kind)."""
    stages = {"whole": 1, "first": 2, "middle": 3, "last": 2}[case["stage"]]
    model = MODELS[case["family"]]
    both = model.architecture is Architecture.encoder_decoder
    layers = {"num_layers": 1, "num_decoder_layers": max(stages - 1, 1)} if both else {"num_layers": stages}
    sizes = {"hidden_size": 128, "max_position_embeddings": LENGTH + 2, "vocab_size": VOCAB_SIZE}
    model = replace(model, **layers, **sizes, **(DROPOUT if case["dropout"] == "yes" else {}))
    dp = int(case["data"].removeprefix("dp"))
    config = RunConfig(
        script=SCRIPTS[model.architecture],
        model=model,
        objective=ObjectiveConfig(name=ObjectiveName(case["objective"])),
        data=DataConfig(seq_length=LENGTH, tokenizer_vocab_size=VOCAB_SIZE),
        parallel=ParallelConfig(
            data_parallel_size=dp,
            tensor_parallel_size=2 if case["tensor"].startswith("tp2") else 1,
            pipeline_parallel_size=stages,
            sequence_parallel=case["tensor"] == "tp2_sp",
            zero_stage=int(case["zero"]),
            offload_optimizer=case["offload"] == "yes",
            recompute=Recompute(case["recompute"]),
        ),
        optimizer=OptimizerConfig(name=OptimizerName(case["optimizer"])),
        train=TrainConfig(
            precision=Precision(case["precision"]),
            micro_batch_size=2,
            global_batch_size=2 * MICRO_BATCHES * dp,
            loss_scale=LossScaleConfig(initial_power=10),
        ),
    )
    return resolve(config, device="cuda")


def rank_of(case: Case, config: ResolvedConfig) -> int:
    """The rank that is rehearsed: of the case's stage, and some tensor- and data-parallel rank."""
    topology, mixed = config.topology, zlib.crc32(name_of(case).encode())
    stage = {"whole": 0, "first": 0, "middle": 1, "last": topology.pipeline_parallel_size - 1}[case["stage"]]
    data = mixed % topology.data_parallel_size
    return topology.rank(stage, data, (mixed >> 8) % topology.tensor_parallel_size)


if __name__ == "__main__":
    before = list(read_cases().values())
    after = extended(before)
    text = f"# One case a line, one value of each axis: {' '.join(AXES)}. See cases.py.\n"
    FILE.write_text(text + "".join(f"- {' '.join(case.values())}\n" for case in after))
    sys.stdout.write(f"{len(after) - len(before)} cases added, {len(after)} in all\n")
