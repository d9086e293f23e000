"""A killed run resumes as if it had not been interrupted."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lite.checkpoint.state import read_state
from megatron_lite.errors import EXIT_USER_ERROR
from megatron_lite.observe.metrics import EVENTS_FILE, read_metrics
from tests.integration.runs import TINY, Finished, end_tree, launch, losses, run_warm, start, wait_for_step

STEPS = ["train.steps=40", "train.save_interval=5", "train.eval_interval=0", "model.hidden_dropout=0.1"]

WHOLE = ["optimizer.decay_steps=12"]  # settings of `whole`, which runs without interruption

RAMP = ["train.batch_ramp.start=4", "train.batch_ramp.increment=4", "train.batch_ramp.samples=60"]  # ends in step 15


@pytest.fixture(scope="module")
def whole(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Losses of twelve steps on one rank, without interruption."""
    run_dir = tmp_path_factory.mktemp("whole")
    run_warm([*TINY, *corpus, *WHOLE, f"train.run_dir={run_dir}"]).require_success()
    return losses(run_dir)


def _kill_at(step: int, command: list[str], run_dir: Path) -> None:
    """SIGKILL the launcher and all ranks once `step` has been logged."""
    process = start(command)
    wait_for_step(process, run_dir, step)
    end_tree(process.pid)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "layout", "precision"),
    [
        ("pretrain_gpt", "parallel=dp2_tp2_pp2", "fp32"),
        ("pretrain_gpt", "parallel=dp2_tp1_pp1", "bf16"),
        ("pretrain_bert", "parallel=dp2_tp1_pp2", "bf16"),
        ("pretrain_t5", "parallel=dp1_tp2_pp2", "fp32"),
    ],
)
def test_killed_run_resumes_bit_identically(
    script: str, layout: str, precision: str, tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    words = [layout, f"train.precision={precision}", *STEPS, *RAMP]
    run_warm(tiny("whole", *words), script=script).require_success()
    step = random.SystemRandom().randint(12, 36)  # the save after step 10 has waited for the one after step 5
    _kill_at(step, launch(*tiny("killed", *words), script=script), tmp_path / "killed")
    finished = run_warm(tiny("killed", *words), script=script).require_success()
    assert "resuming after step" in finished.out, f"killed at step {step}"
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole"), f"killed at step {step}"
    assert len(losses(tmp_path / "whole")) == 40


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_resume_under_zero_2_and_3(zero_stage: int, tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    words = ["parallel=dp2_tp1_pp1", f"parallel.zero_stage={zero_stage}", "optimizer.decay_steps=12"]
    run_warm(tiny("whole", *words)).require_success()
    run_warm(tiny("parts", *words, "train.steps=8")).require_success()
    run_warm(tiny("parts", *words)).require_success()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_the_same_data_under_another_name_resumes_and_other_data_does_not(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("\n\n".join(f"{i} apples and {i * i} pears in basket {i % 7}" for i in range(400)))
    words = [*TINY, f"data.cache_dir={tmp_path / 'cache'}", "optimizer.decay_steps=12"]

    def train(name: str, steps: int, source: Path | str) -> Finished:
        return run_warm([*words, f"train.steps={steps}", f"data.source={source}", f"train.run_dir={tmp_path / name}"])

    train("whole", 6, text).require_success()
    train("parts", 4, text).require_success()
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("apples", "plums"))
    refused = train("parts", 6, other)
    assert refused.code == EXIT_USER_ERROR
    assert refused.err.startswith(f"error: data.source={other} cannot continue from {text} of ")
    assert "Traceback" not in refused.err
    moved = text.rename(tmp_path / "moved.txt")
    resumed = train("parts", 6, f"[{moved}]").require_success()
    assert "optimizer   restored   exp_avg, exp_avg_sq after 4 updates" in resumed.out
    assert "tokenised" not in resumed.out
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    text.write_text(moved.read_text().replace("pears", "plums"))  # same path as the old one, so only the tokens differ
    refused = train("parts", 8, text)
    assert refused.code == EXIT_USER_ERROR
    assert f"data.source={text} cannot continue from" in refused.err


@pytest.mark.slow
def test_damaged_checkpoint_is_skipped(tiny: Callable[..., list[str]], tmp_path: Path, whole: dict) -> None:
    run_warm(tiny("run", *WHOLE, "train.steps=8")).require_success()
    victim = tmp_path / "run" / "checkpoints" / "step_00000008" / "model.safetensors"
    with victim.open("r+b") as file:
        file.truncate(victim.stat().st_size - 4)
    finished = run_warm(tiny("run", *WHOLE)).require_success()
    assert "Skipping step_00000008: model.safetensors is" in finished.out
    assert "resuming after step 4 " in finished.out
    assert losses(tmp_path / "run") == whole


@pytest.mark.slow
def test_second_start_says_done_and_keeps_few_checkpoints(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    words = tiny("run", "train.save_interval=2")
    run_warm(words).require_success()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    finished = run_warm(words).require_success()
    assert "This run is done" in finished.out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000010", "step_00000012"]
    assert read_state(checkpoints / "step_00000012").step == 12
    saves = [event for event in read_metrics(tmp_path / "run" / EVENTS_FILE) if event["event"] == "save"]
    assert [event["step"] for event in saves] == [2, 4, 6, 8, 10, 12]
    assert all(0 < event["stall_seconds"] <= event["total_seconds"] for event in saves)


@pytest.mark.slow
def test_goes_on_under_another_layout_and_another_zero_stage(
    tiny: Callable[..., list[str]], tmp_path: Path, whole: dict
) -> None:
    words = [*WHOLE, "train.save_interval=0"]
    run_warm(tiny("run", *words, "parallel=dp2_tp2_pp2", "train.steps=4")).require_success()
    second = run_warm(tiny("run", *words, "parallel=tp2", "train.steps=8")).require_success()
    assert "weights     resharded  dp2 tp2 pp2 zero1 -> dp1 tp2 pp1 zero1" in second.out
    assert "data        restored   continues with sample 32" in second.out
    third = ["parallel=dp2", "parallel.zero_stage=3"]
    run_warm(tiny("run", *words, *third)).require_success()
    parts = losses(tmp_path / "run")
    assert [loss for loss, _ in parts.values()] == pytest.approx([loss for loss, _ in whole.values()], rel=1e-6)
    refused = run_warm(tiny("run", *words, "model.hidden_size=64", "data.seq_length=16"))
    assert refused.code == 2
    assert "model.hidden_size" in refused.err
    assert "data.seq_length" in refused.err
    assert f"model.init_from={tmp_path / 'run' / 'checkpoints' / 'step_00000012'}" in refused.err
    assert "Traceback" not in refused.err
