"""What a resumed run says of its state, word for word."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megatron_lite.checkpoint.resume import Fate, ResumeReport, describe
from megatron_lite.checkpoint.state import CheckpointState, Layout, LossScaleState, OptimizerState
from megatron_lite.config.compose import compose
from megatron_lite.config.derived import resolve
from megatron_lite.config.frozen import as_containers, from_containers
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import CheckpointError
from megatron_lite.optim.batch_ramp import Origin
from tests.unit.checkpoint.examples import STATE
from tests.unit.remedies import obeys

FOLDER = Path("run/checkpoints/step_00000100")


@cache
def base() -> RunConfig:
    return compose("pretrain_gpt", ["parallel=dp2_tp2_pp2", "train.run_dir=run"])


def config_of(*words: str) -> ResolvedConfig:
    content = OmegaConf.merge(as_containers(base()), OmegaConf.from_dotlist(list(words)))
    return resolve(from_containers(OmegaConf.to_container(content)), device="cpu")  # type: ignore[arg-type]


def state_of(*words: str, **fields: object) -> CheckpointState:
    content = json.loads(json.dumps(as_containers(config_of(*words))))
    return replace(STATE, **{"config": content, **fields})  # type: ignore[arg-type]


def layout_of(config: ResolvedConfig) -> Layout:
    parallel = config.parallel
    return Layout(
        parallel.data_parallel_size,
        parallel.tensor_parallel_size,
        parallel.pipeline_parallel_size,
        parallel.zero_stage,
        parallel.sequence_parallel,
    )


def report_of(state: CheckpointState, *words: str, fingerprint: str = STATE.data_fingerprint) -> ResumeReport:
    config = config_of(*words)
    return describe(state, config, layout_of(config), fingerprint, FOLDER)


def fate_of(report: ResumeReport, name: str) -> tuple[Fate, str]:
    (found,) = (subsystem for subsystem in report.subsystems if subsystem.name == name)
    return found.fate, found.reason


def test_nothing_has_changed() -> None:
    report = report_of(state_of())
    assert (report.origin, report.load_moments, report.load_loss_scale) == (Origin(100, 3200), True, False)
    assert report.lines() == [
        "resuming after step 100 and 3,200 samples",
        "  weights     restored   dp2 tp2 pp2 zero1",
        "  optimizer   restored   exp_avg, exp_avg_sq after 100 updates",
        "  schedule    restored   step 101 has learning rate 0.0002395",
        "  loss scale  restored   fp32 has none",
        "  randomness  restored   seed 1234; masks follow from (seed, sample, layer), nothing is stored",
        "  data        restored   continues with sample 3,200",
    ]


def test_everything_has_changed() -> None:
    before = state_of("model.attention_dropout=0.1", "model.hidden_dropout=0.1")
    report = report_of(
        before,
        "model.attention_dropout=0.1",
        "model.hidden_dropout=0.2",
        "parallel.data_parallel_size=1",
        "parallel.tensor_parallel_size=1",
        "parallel.pipeline_parallel_size=4",
        "optimizer.learning_rate=0.001",
        "train.steps=600",
        "train.global_batch_size=64",
        "train.precision=bf16",
        "train.keep_every=1000",
    )
    assert (report.origin, report.load_moments, report.load_loss_scale) == (Origin(100, 3200), True, False)
    assert report.lines() == [
        "resuming after step 100 and 3,200 samples",
        "  weights     resharded  dp2 tp2 pp2 zero1 -> dp1 tp1 pp4 zero1; computes in bf16 instead of fp32",
        "  optimizer   resharded  exp_avg, exp_avg_sq after 100 updates: dp2 tp2 pp2 zero1 -> dp1 tp1 pp4 zero1",
        "  schedule    reset      new optimizer.learning_rate, train.steps: step 101 has learning rate 0.0009442",
        "  loss scale  restored   bf16 has none",
        "  randomness  reset      seed 1234; parallel.tensor_parallel_size: different masks for "
        "model.attention_dropout from here on",
        "  data        restored   continues with sample 3,200, in batches of 64",
        "  spikes      reset      new model.hidden_dropout, train.global_batch_size, train.precision: earlier losses "
        "and gradient norms are not comparable with later ones",
        "changed settings",
        "  resets     model.hidden_dropout: 0.1 -> 0.2; this dropout has the new rate from here on",
        "  resets     parallel.tensor_parallel_size: 2 -> 1; different masks for model.attention_dropout from here on",
        "  resets     optimizer.learning_rate: 0.0003 -> 0.001; the schedule continues with the new values",
        "  resets     train.steps: 300 -> 600; the learning rate now decays until step 600; optimizer.decay_steps=300 "
        "keeps the earlier schedule",
        "  resets     train.global_batch_size: 32 -> 64; steps from here on use batches of the new size; the data "
        "continues with the next sample; validation is over 512 samples instead of 256",
        "  safe       parallel.pipeline_parallel_size: 2 -> 4",
        "  safe       parallel.data_parallel_size: 2 -> 1",
        "  safe       train.precision: fp32 -> bf16",
        "  safe       train.keep_every: 0 -> 1000",
        "  safe       launcher.num_processes: 8 -> 4",
    ]


@pytest.mark.parametrize(
    ("word", "moves"),
    [
        ("optimizer.z_loss_weight=0.1", True),
        ("model.attention_dropout=0.1", True),
        ("train.global_batch_size=64", True),
        ("train.precision=bf16", True),
        ("tracking.plot=false", False),
        ("optimizer.learning_rate=0.1", False),  # the steps after it may well be spikes, and that is to be seen
        ("optimizer.clip_grad_norm=0.5", False),
        ("parallel.tensor_parallel_size=1", False),
    ],
)
def test_steps_are_judged_anew_after_a_change_with_which_losses_jump(word: str, moves: bool) -> None:
    fresh, later = report_of(state_of(), word), report_of(state_of(comparable_from=31), word)
    assert (fresh.comparable_from, later.comparable_from) == ((101, 101) if moves else (1, 31))
    assert any(line.startswith("  spikes      reset      new ") for line in fresh.lines()) is moves


ADAMW, SGD = OptimizerState("adamw", 98, ("exp_avg", "exp_avg_sq")), "optimizer.name=sgd"
MOMENTUM, PLAIN = OptimizerState("sgd", 98, ("momentum_buffer",)), OptimizerState("sgd", 98, ())


@pytest.mark.parametrize(
    ("stored", "before", "after", "loads", "fate", "reason"),
    [
        (ADAMW, [], [], True, Fate.restored, "exp_avg, exp_avg_sq after 98 updates"),
        (ADAMW, [], [SGD], False, Fate.reset, "adamw -> sgd: moments start from zero"),
        (PLAIN, [SGD], [SGD], False, Fate.restored, "sgd without momentum has no moments"),
        (
            PLAIN,
            [SGD],
            [SGD, "optimizer.momentum=0.9"],
            False,
            Fate.reset,
            "the checkpoint has no moments of sgd: they start from zero",
        ),
        (
            MOMENTUM,
            [SGD, "optimizer.momentum=0.9"],
            [SGD],
            False,
            Fate.restored,
            "sgd without momentum has no moments",
        ),
        (
            MOMENTUM,
            [SGD, "optimizer.momentum=0.9"],
            [SGD, "optimizer.momentum=0.8", "parallel.zero_stage=0"],
            True,
            Fate.resharded,
            "momentum_buffer after 98 updates: dp2 tp2 pp2 zero1 -> dp2 tp2 pp2 zero0",
        ),
    ],
)
def test_moments(
    stored: OptimizerState, before: list[str], after: list[str], loads: bool, fate: Fate, reason: str
) -> None:
    report = report_of(state_of(*before, optimizer=stored), *after)
    assert report.load_moments == loads
    assert fate_of(report, "optimizer") == (fate, reason)


SCALE = LossScaleState(32768.0, 12, 2)


@pytest.mark.parametrize(
    ("before", "after", "loads", "fate", "reason"),
    [
        ("fp16", "fp16", True, Fate.restored, "32,768, 12 steps since it changed"),
        ("fp16", "bf16", False, Fate.reset, "32,768 is dropped: bf16 needs none"),
        ("fp32", "fp16", False, Fate.reset, "starts at 2^16: fp32 had none"),
        ("fp32", "bf16", False, Fate.restored, "bf16 has none"),
    ],
)
def test_loss_scale(before: str, after: str, loads: bool, fate: Fate, reason: str) -> None:
    scale = SCALE if before == "fp16" else None
    state = state_of(f"train.precision={before}", precision=before, loss_scale=scale)
    report = report_of(state, f"train.precision={after}")
    assert report.load_loss_scale == loads
    assert fate_of(report, "loss scale") == (fate, reason)


def test_ramp_is_reported() -> None:
    ramp = ["train.batch_ramp.start=8", "train.batch_ramp.increment=8", "train.batch_ramp.samples=9999"]
    assert fate_of(report_of(state_of(), *ramp), "data") == (
        Fate.restored,
        "continues with sample 3,200, in batches of 32 at the end of the ramp",
    )


def test_another_run_is_refused_with_every_reason() -> None:
    with pytest.raises(CheckpointError) as caught:
        report_of(state_of(), "train.seed=7", "model.num_layers=8", "debug=true")
    assert str(caught.value).splitlines() == [
        f"model.num_layers=8 cannot continue from 4 of {FOLDER}: the weights have the shapes of the earlier value; "
        "keep model.num_layers=4, or begin another run in a new train.run_dir",
        f"train.seed=7 cannot continue from 1234 of {FOLDER}: it determines the order of the data, and so which "
        "samples are left to train on; keep train.seed=1234, or begin another run in a new train.run_dir with "
        f"model.init_from={FOLDER}",
    ]


def test_other_data_is_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        report_of(state_of(), fingerprint="a0a0")
    assert str(caught.value) == (
        f"data.source holds other tokens (fingerprint a0a0) than those that {FOLDER} was trained on (b5c1), so "
        "it is unknown which of them are left to train on; restore the earlier files and tokenizer, or start another "
        f"run in a new train.run_dir with model.init_from={FOLDER}"
    )


def test_the_same_data_under_another_name_goes_on_with_the_moments() -> None:
    report = report_of(state_of("data.source=/x/a.jsonl"), "data.source=/x/./a.jsonl")
    assert report.load_moments
    assert report.lines()[-1] == "  safe       data.source: /x/a.jsonl -> /x/./a.jsonl"


def test_a_run_of_the_older_order_of_sources_is_reported_and_goes_on() -> None:
    report = report_of(state_of(samples=655_360), fingerprint=f"{STATE.data_fingerprint}.f00d")
    assert fate_of(report, "data") == (
        Fate.reset,
        "continues with sample 655,360; this version blends the sources in another order: of each source, up to "
        "about 14 samples are repeated or skipped",
    )
    with pytest.raises(CheckpointError, match=r"data\.weights=\[1\.0,3\.0\] cannot continue from \[1\.0,2\.0\]"):
        report_of(state_of("data.weights=[1,2]"), "data.weights=[1,3]", fingerprint=f"{STATE.data_fingerprint}.f00d")


@obeys("megatron_lite/checkpoint/resume.py:describe")
def test_configuration_of_another_version() -> None:
    with pytest.raises(
        CheckpointError, match=rf"{FOLDER}: this version cannot read .*'flavour'.*continue with the ver"
    ):
        report_of(state_of(config={**state_of().config, "train": {"flavour": 1}}))
    assert report_of(state_of()).lines()  # as the version that wrote it would
