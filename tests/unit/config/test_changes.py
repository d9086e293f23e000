"""Every setting has one grade, and every change says what it does to a run."""

from __future__ import annotations

import shutil
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from megatron_lite.config.changes import (
    DATA_KEYS,
    Change,
    Grade,
    as_typed,
    grade_changes,
    refusals,
    table,
)
from megatron_lite.config.compose import compose
from megatron_lite.config.decays import Decay
from megatron_lite.config.derived import fill_in
from megatron_lite.config.facts import facts
from megatron_lite.config.frozen import as_node
from megatron_lite.config.keys import leaf_keys
from megatron_lite.config.schema import Precision, RunConfig
from megatron_lite.config.setting import SAFE, Forbidden, Resets

RESETS = {key: found.resume for key, found in facts().items() if isinstance(found.resume, Resets)}
DROPOUT = "model.attention_dropout=0.1,model.hidden_dropout=0.1"


@cache
def base() -> DictConfig:
    return as_node(compose("pretrain_gpt", ["train.run_dir=run", "launcher.num_processes=8"]))


@cache
def config_of(words: str) -> RunConfig:
    """Without Hydra, which takes a third of a second for each."""
    merged = OmegaConf.merge(base(), OmegaConf.from_dotlist(words.split(",") if words else []))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, RunConfig)
    return fill_in(config, device=None if "device=" in words else "cpu")


def changes_of(before: str, after: str) -> list[Change]:
    return grade_changes(config_of(before), config_of(after))


def consequence_of(before: str, after: str, key: str) -> str:
    (change,) = (change for change in changes_of(before, after) if change.key == key)
    assert (change.grade is Grade.resets) == bool(change.consequence)
    return change.consequence


def test_every_setting_has_exactly_one_grade() -> None:
    """Declared at its field: resume=SAFE, or an effect of config/resume_effects.py."""
    safe = [key for key, found in facts().items() if found.resume is SAFE]
    forbidden = [key for key, found in facts().items() if isinstance(found.resume, Forbidden)]
    graded = Counter([*safe, *RESETS, *forbidden])
    assert sorted(set(leaf_keys()) - set(graded)) == []
    assert sorted(set(graded) - set(leaf_keys())) == []
    assert [key for key, count in graded.items() if count > 1] == []


def test_equal_configurations_have_no_changes() -> None:
    assert changes_of("train.steps=7", "train.steps=7") == []


@pytest.mark.parametrize("layout", ["tensor", "pipeline", "data"])
def test_layout_is_safe_without_dropout(layout: str) -> None:
    changes = changes_of("", f"parallel.{layout}_parallel_size=2,parallel.zero_stage=3,parallel.recompute=full")
    assert len(changes) >= 3
    for change in changes:
        assert (change.grade, change.consequence, change.remedy) == (Grade.safe, "", ""), change


MASKS = "different masks for model.attention_dropout"
CONSEQUENCES = [
    ("", "parallel.tensor_parallel_size=2", "parallel.tensor_parallel_size", ""),
    (DROPOUT, f"{DROPOUT},parallel.tensor_parallel_size=2", "parallel.tensor_parallel_size", f"{MASKS} from here on"),
    (DROPOUT, f"{DROPOUT},parallel.pipeline_parallel_size=2", "parallel.pipeline_parallel_size", ""),
    (
        "model.hidden_dropout=0.1",
        "model.hidden_dropout=0.1,parallel.tensor_parallel_size=2",
        "parallel.tensor_parallel_size",
        "",
    ),
    (
        DROPOUT,
        f"{DROPOUT},parallel.tensor_parallel_size=2,parallel.sequence_parallel=true",
        "parallel.tensor_parallel_size",
        f"{MASKS} and model.hidden_dropout from here on",
    ),
    (
        f"{DROPOUT},parallel.tensor_parallel_size=2",
        f"{DROPOUT},parallel.tensor_parallel_size=2,parallel.sequence_parallel=true",
        "parallel.sequence_parallel",
        "different masks for model.hidden_dropout from here on",
    ),
    ("", "train.micro_batch_size=8", "train.micro_batch_size", ""),
    (
        "model.ffn_dropout=0.1",
        "model.ffn_dropout=0.1,train.micro_batch_size=8",
        "train.micro_batch_size",
        "different masks for model.ffn_dropout from here on",
    ),
    ("", "launcher.device=cuda", "launcher.device", ""),
    (
        "model.final_dropout=0.1",
        "model.final_dropout=0.1,launcher.device=cuda",
        "launcher.device",
        "different masks for model.final_dropout from here on",
    ),
    (
        "",
        "train.steps=600",
        "train.steps",
        "the learning rate now decays until step 600; optimizer.decay_steps=300 keeps the earlier schedule",
    ),
    ("optimizer.decay_steps=300", "optimizer.decay_steps=300,train.steps=600", "train.steps", ""),
    ("optimizer.decay=constant", "optimizer.decay=constant,train.steps=600", "train.steps", ""),
    ("", "train.steps=600,optimizer.decay_steps=300", "train.steps", ""),
    ("", "train.steps=600,optimizer.decay_steps=300", "optimizer.decay_steps", ""),
    ("", "optimizer.decay_steps=200", "optimizer.decay_steps", "the learning rate now decays until step 200"),
    ("optimizer.decay=inverse_sqrt", "optimizer.decay=inverse_sqrt,train.steps=600", "train.steps", ""),
    (
        "optimizer.decay=constant",
        "optimizer.decay=constant,optimizer.min_learning_rate=1e-9",
        "optimizer.min_learning_rate",
        "",
    ),
    ("", "train.precision=bf16", "train.precision", ""),
    ("", "train.precision=fp16", "train.precision", "fp16's loss scale starts at 2^16"),
    ("train.precision=fp16", "train.precision=bf16", "train.precision", "fp16's loss scale is dropped"),
    ("", "train.loss_scale.window=5", "train.loss_scale.window", ""),
    (
        "train.precision=fp16",
        "train.precision=fp16,train.loss_scale.window=5",
        "train.loss_scale.window",
        "the loss scale keeps its value and follows the new rule",
    ),
    ("", "optimizer.name=sgd", "optimizer.name", "moments start from zero"),
    ("optimizer.name=sgd", "optimizer.name=sgd,optimizer.beta1=0.8", "optimizer.beta1", ""),
    ("", "optimizer.beta1=0.8", "optimizer.beta1", "updates from here on use the new value"),
    ("", "optimizer.warmup_steps=20", "optimizer.warmup_steps", "the schedule continues with the new values"),
    (
        "",
        "train.global_batch_size=64",
        "train.global_batch_size",
        "steps from here on use batches of the new size; the data continues with the next sample; validation is over "
        "512 samples instead of 256",
    ),
    ("", "train.eval_batches=4", "train.eval_batches", "validation is over 128 samples instead of 256"),
    ("", "train.eval_batches=4,train.global_batch_size=64", "train.eval_batches", ""),
    ("", "model.hidden_dropout=0.2", "model.hidden_dropout", "this dropout has the new rate from here on"),
]


@pytest.mark.parametrize(("before", "after", "key", "consequence"), CONSEQUENCES)
def test_consequence(before: str, after: str, key: str, consequence: str) -> None:
    assert consequence_of(before, after, key) == consequence


def test_what_resets_under_no_values_is_safe() -> None:
    """Each entry of the table can have something to say."""
    told = {key for before, after, key, consequence in CONSEQUENCES if consequence}
    always = {key for key, rule in RESETS.items() if _says_always(key, rule)}
    assert set(RESETS) - told - always <= {
        "optimizer.beta2", "optimizer.epsilon", "optimizer.momentum",  # as beta1
        "train.loss_scale.hysteresis", "train.loss_scale.minimum",  # as the window
    }  # fmt: skip


def _says_always(key: str, rule: Resets) -> bool:
    """Of any two values, under some decay."""
    configs = [config_of(f"train.precision=fp32,optimizer.decay={decay}") for decay in Decay]
    assert all(config.train.precision is Precision.fp32 for config in configs)
    return any(rule.consequence(config, config, key) for config in configs)


def test_forbidden_ones_come_with_a_way_round() -> None:
    changes = grade_changes(
        config_of(""), config_of("data.seq_length=64,model.hidden_size=64,debug=true"), Path("run/checkpoints/step_7")
    )
    assert refusals(changes, "the run in FOLDER") == [
        "model.hidden_size=64 cannot continue from 128 of the run in FOLDER: the weights have the shapes of the "
        "earlier value; keep model.hidden_size=128, or begin another run in a new train.run_dir",
        "model.head_size=16 cannot continue from 32 of the run in FOLDER: the weights have the shapes of the earlier "
        "value; keep model.head_size=32, or begin another run in a new train.run_dir",
        "model.ffn_hidden_size=256 cannot continue from 512 of the run in FOLDER: the weights have the shapes of the "
        "earlier value; keep model.ffn_hidden_size=512, or begin another run in a new train.run_dir",
        "data.seq_length=64 cannot continue from 128 of the run in FOLDER: it determines the samples, and so "
        "which of them are left to train on; keep data.seq_length=128, or begin another run in a new train.run_dir "
        "with model.init_from=run/checkpoints/step_7",
    ]


def test_table_has_the_grave_ones_first() -> None:
    changes = changes_of("", "train.seed=1,optimizer.momentum=0.9,debug=true,optimizer.clip_grad_norm=0")
    assert [line.split(":")[0] for line in table(changes)] == [
        "forbidden  train.seed",
        "resets     optimizer.clip_grad_norm",
        "safe       optimizer.momentum",
        "safe       debug",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1e-05, "1e-05"),
        (["a", 2], "[a,2]"),
        (Precision.bf16, "bf16"),
        ("\n\n", r"'\n\n'"),
        ("", "''"),
        ({"WANDB_API_KEY": "secret"}, "{WANDB_API_KEY: ...}"),
    ],
)
def test_values_as_they_are_typed(value: object, text: str) -> None:
    assert as_typed(value) == text


def test_settings_of_the_data_are_judged_by_its_tokens() -> None:
    before, after = config_of("data.source=/a/x.txt"), config_of("data.source=/b/x.txt,data.tokenizer=tok")
    grades = {
        which: [change.grade for change in grade_changes(before, after, **{which: DATA_KEYS})]
        for which in ("same", "undecided")
    }
    assert grades == {"same": [Grade.safe, Grade.forbidden], "undecided": [Grade.safe, Grade.forbidden]}
    assert [change.grade for change in grade_changes(before, after)] == [Grade.forbidden] * 2
    (change, _) = grade_changes(before, after, undecided=DATA_KEYS)
    assert "with the tokens that it had" in change.consequence
    size = config_of("data.source=/a/x.txt,data.tokenizer_vocab_size=999")
    assert [change.grade for change in grade_changes(before, size, same=DATA_KEYS)] == [Grade.forbidden]


def grade_of_weights(before: object, after: object) -> tuple[Grade, str]:
    (change,) = changes_of(f"model.init_from={before}", f"model.init_from={after}")
    return change.grade, change.consequence


def test_weights_to_begin_with_are_known_by_what_they_hold(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text("{}")
    (old / "model.safetensors").write_bytes(b"weights")
    other = shutil.copytree(old, tmp_path / "other")
    assert grade_of_weights(old, f"{old.parent}/./old") == (Grade.safe, "")
    assert grade_of_weights(old, other) == (Grade.safe, "")
    (other / "model.safetensors").write_bytes(b"Weights")
    assert grade_of_weights(old, other)[0] is Grade.forbidden
    assert grade_of_weights(old, "null")[0] is Grade.forbidden
    shutil.rmtree(old)  # then the remedy to keep it would not work
    gone = (Grade.safe, "the earlier one is gone; the weights come from the checkpoint")
    assert grade_of_weights(old, other) == grade_of_weights(old, "null") == gone
    assert grade_of_weights("gpt2", "gpt2-medium")[0] is Grade.forbidden  # names of the hub
