"""Configurations that pass validation also train: a few very different ones, two steps each.

Each run sets as many settings as possible, and picks for each one the value that forms the most new pairs with values
of other settings. So a few runs try thousands of pairs (a covering array, built greedily like AETG).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from megatron_lite.config.compose import compose
from megatron_lite.config.decays import Decay
from megatron_lite.config.derived import fill_in
from megatron_lite.config.schema import RunConfig
from megatron_lite.config.validate import problems
from megatron_lite.errors import ConfigError
from tests.integration.runs import losses, run_warm

RUNS = 5
LAYOUTS = (
    "dp1_tp1_pp1",
    "dp2_tp1_pp1",
    "dp1_tp2_pp1",
    "dp1_tp1_pp2",
)  # two ranks at most: the suite's time is CPU time
NUMBERS: dict[str, tuple[float | None, ...]] = {
    "model.num_layers": (1, 4),
    "model.hidden_size": (16, 24, 40),
    "model.num_attention_heads": (1, 2, 4),
    "model.num_query_groups": (None, 1, 2),
    "model.head_size": (None, 2, 8),
    "model.ffn_hidden_size": (None, 2, 50),
    "model.vocab_pad_multiple": (1, 128),
    "model.norm_epsilon": (1.2e-38, 1.0),
    "model.rotary_base": (1.0, 1e12),
    "model.init_std": (1.2e-38, 1.0),
    "model.embedding_dropout": (0.0, 0.9999998),
    "model.attention_dropout": (0.0, 0.9999998),
    "model.hidden_dropout": (0.0, 0.9999998),
    "model.ffn_dropout": (0.0, 0.9999998),
    "data.seq_length": (1, 64),
    "optimizer.learning_rate": (1.2e-38, 1.0),
    "optimizer.min_learning_rate": (0.0, 1.0),
    "optimizer.warmup_steps": (0, 1),
    "optimizer.decay_steps": (None, 2, 10**6),
    "optimizer.decay_fraction": (0.0, 1.0),
    "optimizer.beta1": (0.0, 0.9999998),
    "optimizer.beta2": (0.0, 0.9999998),
    "optimizer.epsilon": (1.2e-38, 1.0),
    "optimizer.weight_decay": (0.0, 1000.0),
    "optimizer.clip_grad_norm": (0.0, 3.4e38),
    "train.seed": (0, 2**63 - 1),
    "train.micro_batch_size": (1, 2),
    "train.global_batch_size": (1, 8),
    "train.eval_interval": (0, 3),
    "train.save_interval": (0, 3),
    "train.log_interval": (1, 3),
    "train.generate_tokens": (0, 4),
    "stability.window": (1, 10**4),
    "stability.min_steps": (1, 3),
    "stability.layer_interval": (0, 2),
}
"""For a range, its ends and a number between them are tried."""
CHOICES = {
    "model.normalization": ("layernorm", "rmsnorm"),
    "model.norm_placement": ("pre", "post"),
    "model.activation": ("relu", "gelu", "gelu_tanh", "swiglu", "geglu"),
    "model.position_embedding": ("learned", "rotary", "relative"),
    "model.tie_embeddings": ("true", "false"),
    "model.attention_bias": ("true", "false"),
    "model.init": ("normal", "plain", "t5"),
    "parallel.zero_stage": ("0", "1", "2", "3"),
    "parallel.recompute": ("none", "selective", "full"),
    "parallel.sequence_parallel": ("false", "true"),
    "optimizer.decay": tuple(Decay),
    "train.precision": ("fp32", "bf16"),
    "stability.on_spike": ("warn", "skip_step"),
}
OBJECTIVES = {
    "pretrain_gpt": ("causal_lm", "prefix_lm", "fill_in_the_middle"),
    "pretrain_bert": ("masked_lm", "masked_lm_nsp"),
    "pretrain_t5": ("span_corruption", "bart_denoising", "ul2"),
}
PRESETS = {"pretrain_gpt": ("gpt_tiny", "llama_tiny"), "pretrain_bert": ("bert_tiny",), "pretrain_t5": ("t5_tiny",)}
Pair = frozenset[tuple[str, str]]


TINY = [
    "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=2", "data.seq_length=32",
    "data.tokenizer_vocab_size=512", "train.micro_batch_size=1", "train.global_batch_size=4", "train.steps=2",
    "train.eval_interval=0", "train.eval_batches=1", "train.save_interval=0", "train.generate_tokens=0",
    "optimizer.warmup_steps=0", "tracking.plot=false",
]  # fmt: skip


def values_of(key: str, chance: random.Random) -> list[str]:
    if key in CHOICES:
        return list(CHOICES[key])
    given = NUMBERS[key]
    low, *_, high = given
    if len(given) > 2 or low is None or high is None:
        between = []
    elif isinstance(high, int):
        between = [chance.randint(int(low), high)]
    else:
        between = [chance.uniform(low, high)]
    return ["null" if value is None else str(value) for value in (*given, *between)]


def pairs_with(word: tuple[str, str], chosen: dict[str, str]) -> set[Pair]:
    return {frozenset((word, other)) for other in chosen.items()}


def completed(script: str, groups: dict[str, str], covered: set[Pair], chance: random.Random) -> dict[str, str]:
    """The groups, plus a value for every setting that has one which is valid together with those chosen before."""
    chosen = dict(groups)
    config = compose(script, [*TINY, *(f"{key}={value}" for key, value in groups.items())])
    keys = [*NUMBERS, *CHOICES]
    chance.shuffle(keys)
    for key in keys:
        values = values_of(key, chance)
        chance.shuffle(values)
        for value in sorted(values, key=lambda value: -len(pairs_with((key, value), chosen) - covered)):
            changed = with_value(config, key, value)
            if is_valid(changed):
                config, chosen[key] = changed, value
                break
    return chosen


def with_value(config: RunConfig, key: str, value: str) -> RunConfig:
    """The configuration after the override `key=value`, without the tens of milliseconds that Hydra takes."""
    group, name = key.split(".")
    before = getattr(config, group)
    kind = type(getattr(before, name))
    read = kind if issubclass(kind, StrEnum) else json.loads
    return replace(config, **{group: replace(before, **{name: read(value)})})


def is_valid(config: RunConfig) -> bool:
    try:
        return not problems(fill_in(config, device="cpu"))
    except ConfigError:
        return False


@cache
def configurations() -> list[tuple[str, dict[str, str]]]:
    """Scripts and their settings, the same in every run of the tests."""
    chance, covered, found = random.Random(0), set[Pair](), []
    scripts = ["pretrain_gpt", "pretrain_t5", "pretrain_bert", "pretrain_gpt", "pretrain_t5"]
    for number, script in enumerate(scripts):
        groups = {
            "model": PRESETS[script][number % len(PRESETS[script])],
            "objective": chance.choice(OBJECTIVES[script]),
            "parallel": LAYOUTS[number % len(LAYOUTS)],
            "optimizer": ("adamw", "sgd")[number % 2],
        }
        chosen = completed(script, groups, covered, chance)
        covered |= {frozenset(pair) for pair in combinations(chosen.items(), 2)}
        found.append((script, chosen))
    return found


def test_a_few_runs_try_most_of_the_settings_together() -> None:
    """For comparison: ten runs with four to ten random settings each tried less than 900 pairs."""
    settings = [chosen for _, chosen in configurations()]
    assert {key for chosen in settings for key in chosen} >= {*NUMBERS, *CHOICES}
    assert len({frozenset(pair) for chosen in settings for pair in combinations(chosen.items(), 2)}) > 3000


@pytest.mark.slow
@pytest.mark.parametrize("number", range(RUNS))
def test_what_validates_trains(number: int, tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    script, chosen = configurations()[number]
    words = [f"{key}={value}" for key, value in chosen.items()]
    finished = run_warm(tiny("run", *TINY, *words), script=script)
    assert finished.code == 0, f"{script} {' '.join(words)}\n{finished.out}\n{finished.err}"
    assert set(losses(tmp_path / "run")) <= {1, 2}
