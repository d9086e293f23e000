"""Faults planted in real runs: detected in time, traced to their documents, and rolled back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.data.samples.skips import Rollback, Window, read_rollbacks, write_rollbacks
from megatron_lite.observe.metrics import EVENTS_FILE, METRICS_FILE, read_metrics
from megatron_lite.observe.report import write_report
from megatron_lite.observe.wandb_record import alerts, history
from megatron_lite.observe.wandb_tracker import run_id
from tests.integration.planted import Planted, plant
from tests.integration.runs import TINY, Finished, run_warm

BATCH = 16
FIRST, LAST = 37, 42  # steps that read garbage
GARBAGE = Window((FIRST - 1) * BATCH, LAST * BATCH)
SETTINGS = [
    f"train.global_batch_size={BATCH}",
    "train.steps=44",
    "train.save_interval=8",
    "train.eval_interval=0",
    "train.eval_batches=4",
    "train.generate_tokens=0",
    "optimizer.learning_rate=1e-2",
    "optimizer.decay=constant",
]
CUBE = ["parallel=dp2_tp2_pp2", "parallel.stages=even", "train.micro_batch_size=4"]
ALONE = ["train.micro_batch_size=16"]


@pytest.fixture(scope="module")
def planted(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant([*TINY, *corpus], tmp_path_factory.mktemp("planted"), GARBAGE)


def spiked(planted: Planted, run_dir: Path, *words: str, fault: dict[str, str] | None = None) -> Finished:
    return run_warm([*planted.words, *SETTINGS, f"train.run_dir={run_dir}", *words], planted=fault)


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(run_dir / EVENTS_FILE) if event["event"] == kind]


def metrics(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Figures by step, without those that depend on the clock or the machine."""
    rows = read_metrics(run_dir / METRICS_FILE)
    kept = ("loss", "grad_norm", "samples", "skipped", "spike")
    assert len({row["step"] for row in rows}) == len(rows), "a step stands there twice"
    return {row["step"]: {name: row[name] for name in kept} for row in rows}


def validation_loss(run_dir: Path) -> float:
    return float(events(run_dir, "evaluation")[-1]["validation_loss"])


@pytest.fixture(scope="module")
def never_saw(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that skips the garbage from the start, together with the samples before it that a rollback also skips."""
    run_dir = tmp_path_factory.mktemp("never-saw")
    write_rollbacks(run_dir, [Rollback(Window(GARBAGE.first - BATCH, GARBAGE.stop), FIRST, 0, "known before")])
    spiked(planted, run_dir, *ALONE).require_success()
    assert events(run_dir, "spike") == []
    return run_dir


@pytest.fixture(scope="module")
def rolled_back(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("rollback") / "run"
    finished = spiked(planted, run_dir, *CUBE, "stability=rollback", "tracking.wandb=offline").require_success()
    assert f"spike at step {FIRST}: loss" in finished.out
    assert (
        f"rollback 1 of 4: back to step 32, without samples {GARBAGE.first - BATCH} to {GARBAGE.stop - 1}"
        in finished.out
    )
    return run_dir


@pytest.mark.slow
def test_rollback_is_the_run_that_never_saw_the_garbage(rolled_back: Path, never_saw: Path) -> None:
    """Figures agree to the last digits that layouts have in common, not only within 2 % of the validation loss."""
    found, expected = metrics(rolled_back), metrics(never_saw)
    assert list(found) == list(expected) == list(range(1, 45))
    assert [row["loss"] for row in found.values()] == pytest.approx(
        [row["loss"] for row in expected.values()], rel=1e-5
    )
    assert validation_loss(rolled_back) == pytest.approx(validation_loss(never_saw), rel=1e-5)
    assert [one.window for one in read_rollbacks(rolled_back)] == [Window(GARBAGE.first - BATCH, GARBAGE.stop)]


@pytest.mark.slow
def test_every_rank_decides_the_same(rolled_back: Path) -> None:
    said = [
        re.findall(r"^(?:judged|rollback) .*$", (rolled_back / "logs" / f"rank-{rank}.log").read_text(), re.MULTILINE)
        for rank in range(8)
    ]
    assert said == [said[0]] * 8
    assert [line.split(":")[0] for line in said[0]] == [f"judged step {FIRST} a spike", "rollback 1 of 4"]


@pytest.mark.slow
def test_spike_report_names_the_planted_documents(rolled_back: Path, planted: Planted) -> None:
    (event,) = events(rolled_back, "spike")
    assert event["step"] == FIRST
    assert event["action"] == "rollback"
    spike_report = json.loads((rolled_back / event["spike_report"]).read_text())
    assert spike_report["samples"] == [[GARBAGE.first, GARBAGE.first + BATCH]]
    assert spike_report["checkpoint"] == "step_00000032"
    named = {entry["document"] for entry in spike_report["documents"]}
    assert named
    assert named <= planted.documents
    assert {sample for entry in spike_report["documents"] for sample in entry["samples"]} == set(
        range(GARBAGE.first, GARBAGE.first + BATCH)
    )
    assert len(spike_report["sequences"]) == 4
    losses = [sequence["loss"] for sequence in spike_report["sequences"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > spike_report["loss"] > spike_report["usual_loss"]
    assert all(len(sequence["text"]) > 20 for sequence in spike_report["sequences"])
    assert list(spike_report["layer_grad_norm"]) == [str(step) for step in range(FIRST - 4, FIRST + 1)]
    norms = spike_report["layer_grad_norm"]
    assert sum(norm**2 for norm in norms[str(FIRST)].values()) ** 0.5 == pytest.approx(event["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_nothing_in_a_run_folder_is_wider_readable_than_the_data(rolled_back: Path, tmp_path: Path) -> None:
    kinds = ("spikes/*.json", "checkpoints/*/tokenizer.json", "logs/rank-7.log", "wandb/*/*.wandb")
    assert all(list(rolled_back.glob(kind)) for kind in kinds)
    page = write_report(rolled_back, "done", tmp_path / "page.html")
    found = [page, rolled_back, *(path for path in rolled_back.rglob("*") if not path.is_symlink())]
    beats = rolled_back / "logs" / "heartbeats"  # contain phases, no text of documents
    assert [path for path in found if path.stat().st_mode & 0o077 and not path.is_relative_to(beats)] == []


@pytest.mark.slow
def test_warn_trains_on_and_ends_worse(planted: Planted, rolled_back: Path, tmp_path: Path) -> None:
    spiked(planted, tmp_path, *CUBE).require_success()
    assert [event["step"] for event in events(tmp_path, "spike")] == [FIRST]
    assert validation_loss(tmp_path) > 1.02 * validation_loss(rolled_back)
    assert read_rollbacks(tmp_path) == []
    (event,) = events(tmp_path, "spike")
    spike_report = json.loads((tmp_path / event["spike_report"]).read_text())
    assert list(spike_report["layer_grad_norm"]) == [
        str(step) for step in range(FIRST - 4, FIRST + 3)
    ]  # also those after the spike


@pytest.mark.slow
def test_skip_step_drops_the_updates(planted: Planted, tmp_path: Path) -> None:
    spiked(planted, tmp_path, *ALONE, "stability=skip_step").require_success()
    rows = metrics(tmp_path)
    assert [step for step, row in rows.items() if row["skipped"]] == list(range(FIRST, LAST + 1))
    assert rows[44]["samples"] == 44 * BATCH  # the samples count as consumed


@pytest.mark.slow
def test_a_last_step_that_is_dropped_does_not_end_the_run_as_diverged(planted: Planted, tmp_path: Path) -> None:
    """The validation after it shows that the weights are finite, so they are saved."""
    words = [*ALONE, "stability=skip_step", "train.steps=20"]
    spiked(planted, tmp_path, *words, fault={"FAULT": "nan 0 20"}).require_success()
    assert metrics(tmp_path)[20]["skipped"]
    assert [event["step"] for event in events(tmp_path, "save")] == [8, 16, 20]


@pytest.mark.slow
def test_each_of_two_spikes_has_the_steps_after_it(planted: Planted, tmp_path: Path) -> None:
    """The second spike comes two steps after the first."""
    words = [*ALONE, "stability=skip_step", "train.steps=20"]
    spiked(planted, tmp_path, *words, fault={"FAULT": "nan 0 10;nan 0 12"}).require_success()
    found = [json.loads((tmp_path / event["spike_report"]).read_text()) for event in events(tmp_path, "spike")]
    assert [list(map(int, spike_report["layer_grad_norm"])) for spike_report in found] == [
        list(range(step - 4, step + 3)) for step in (10, 12)
    ]


@pytest.mark.slow
def test_a_step_that_is_a_spike_again_has_another_spike_report(planted: Planted, tmp_path: Path) -> None:
    """Batch 13 is read as the 13th, and after a rollback to step 8 as the 18th. The disk is full until step 15."""
    words = [*ALONE, "stability=rollback", "stability.look_ahead_steps=0", "train.steps=20"]
    fault = {"FAULT": "nan 0 13;nan 0 18", "FAULT_FULL_DISK": "12"}
    finished = spiked(planted, tmp_path, *words, fault=fault).require_success()
    said = [finished.out.find(text) for text in ("skipped_samples.json cannot be written", "checkpoints can be saved")]
    assert 0 < said[0] < said[1], finished.out
    assert len(read_rollbacks(tmp_path)) == 2
    found = events(tmp_path, "spike")
    assert [event["step"] for event in found] == [13, 13]
    samples = [json.loads((tmp_path / event["spike_report"]).read_text())["samples"] for event in found]
    assert samples == [[[12 * BATCH, 13 * BATCH]], [[14 * BATCH, 15 * BATCH]]]


@pytest.mark.slow
@pytest.mark.parametrize("words", [["parallel.zero_stage=3"], ["parallel.zero_stage=2", "train.precision=bf16"]])
def test_rollback_under_the_other_engine(words: list[str], planted: Planted, never_saw: Path, tmp_path: Path) -> None:
    finished = spiked(planted, tmp_path, "parallel=dp2", "train.micro_batch_size=8", "stability=rollback", *words)
    assert "rollback 1 of 4: back to step 32" in finished.require_success().out
    found, expected = metrics(tmp_path), metrics(never_saw)
    assert [row["loss"] for row in found.values()] == pytest.approx(
        [row["loss"] for row in expected.values()], rel=0.02 if "train.precision=bf16" in words else 1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "step", "kinds"), [("nan 5 28", 28, {"not_finite"}), ("lr all 28", 29, {"loss", "grad_norm"})]
)
def test_other_faults(
    fault: str, step: int, kinds: set[str], planted: Planted, never_saw: Path, tmp_path: Path
) -> None:
    """NaN in an activation of one rank is detected in the same step, a learning rate 100 times too high in the next.

    With the weights at that point every batch is a spike, but only the samples of that step are skipped.
    """
    words = ["stability=rollback", "stability.lead_in_steps=0", "train.steps=32"]
    spiked(planted, tmp_path, *CUBE, *words, fault={"FAULT": fault}).require_success()
    (event,) = events(tmp_path, "spike")
    assert event["step"] == step
    assert kinds & set(event["kinds"])
    (rollback,) = read_rollbacks(tmp_path)
    assert rollback.to_step == 24
    assert rollback.window == Window((step - 1) * BATCH, step * BATCH)
    assert validation_loss(tmp_path) < 1.1 * metrics(never_saw)[32]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["ahead of the file", "behind the file", "in the checkpoints", "behind everything"])
def test_a_crash_in_the_middle_of_a_rollback(place: str, planted: Planted, never_saw: Path, tmp_path: Path) -> None:
    words = ["parallel=dp2", "train.micro_batch_size=8", "stability=rollback"]
    broken = spiked(planted, tmp_path, *words, fault={"FAULT_ROLLBACK": f"0 {place}"})
    assert broken.code != 0
    assert not events(tmp_path, "finish")
    finished = spiked(planted, tmp_path, *words).require_success()
    assert "resuming after step" in finished.out
    assert [one.window for one in read_rollbacks(tmp_path)] == [Window(GARBAGE.first - BATCH, GARBAGE.stop)]
    found, expected = metrics(tmp_path), metrics(never_saw)
    assert [row["loss"] for row in found.values()] == pytest.approx(
        [row["loss"] for row in expected.values()], rel=1e-5
    )
    assert len(events(tmp_path, "rollback")) == (0 if place in ("behind the file", "in the checkpoints") else 1)


@pytest.mark.slow
def test_a_stop_in_the_middle_of_a_rollback(planted: Planted, never_saw: Path, tmp_path: Path) -> None:
    """The stop comes while the rollback looks ahead (its first read is the run's 38th); the next attempt decides the
    same."""
    words = ["train.micro_batch_size=1", "stability=rollback"]
    assert spiked(planted, tmp_path, *words, fault={"FAULT": f"ask 0 {FIRST + 2}"}).code == 75
    assert read_rollbacks(tmp_path) == []
    assert "resuming after step 32" in spiked(planted, tmp_path, *words).require_success().out
    assert [one.window for one in read_rollbacks(tmp_path)] == [Window(GARBAGE.first - BATCH, GARBAGE.stop)]
    found, expected = metrics(tmp_path), metrics(never_saw)
    assert [row["loss"] for row in found.values()] == pytest.approx(
        [row["loss"] for row in expected.values()], rel=1e-5
    )


@pytest.mark.slow
def test_back_to_before_a_change_of_the_optimizer(planted: Planted, tmp_path: Path) -> None:
    """The moments start at zero again, as in a run that skips the samples when it changes the optimizer."""
    back, known = tmp_path / "back", tmp_path / "known"
    words = [*ALONE, "stability=rollback", "train.save_interval=24"]
    for run_dir in (back, known):
        spiked(planted, run_dir, *words, "train.steps=24").require_success()
    words += ["optimizer=sgd", "optimizer.learning_rate=1e-2"]
    spiked(planted, back, *words).require_success()
    assert [one.to_step for one in read_rollbacks(back)] == [24]
    write_rollbacks(known, read_rollbacks(back))
    spiked(planted, known, *words).require_success()
    assert events(known, "spike") == []
    assert metrics(back) == metrics(known)


@pytest.mark.slow
def test_the_budget_ends(planted: Planted, tmp_path: Path) -> None:
    words = [*ALONE, "stability=rollback", "stability.max_rollbacks=1", "stability.look_ahead_steps=0"]
    finished = spiked(planted, tmp_path, *words)
    assert finished.code == 81
    assert "all stability.max_rollbacks=1 rollbacks of this run are used up (they left out samples " in finished.err
    assert (tmp_path / "DIVERGED").exists()


@pytest.mark.slow
def test_without_looking_ahead_windows_grow(planted: Planted, never_saw: Path, tmp_path: Path) -> None:
    """6 bad steps: the first rollback skips 1, the second 1 more at the same place, the third 3 more, past the end."""
    spiked(planted, tmp_path, *ALONE, "stability=rollback", "stability.look_ahead_steps=0").require_success()
    rollbacks = read_rollbacks(tmp_path)
    assert len(rollbacks) == 3
    assert rollbacks[-1].window.stop >= GARBAGE.stop
    assert validation_loss(tmp_path) == pytest.approx(validation_loss(never_saw), rel=0.02)


@pytest.mark.slow
def test_no_checkpoint_to_go_back_to(planted: Planted, tmp_path: Path) -> None:
    words = [*ALONE, "stability=rollback", "train.save_interval=40"]
    finished = spiked(planted, tmp_path, *words).require_success()
    assert (
        "no checkpoint is older than the samples that led to the spike: only the update of step 37 is skipped"
        in finished.out
    )
    assert next(step for step, row in metrics(tmp_path).items() if row["skipped"]) == FIRST


@pytest.mark.slow
def test_wandb_holds_every_step_once_with_the_spike_and_its_alert(
    planted: Planted, rolled_back: Path, tmp_path: Path
) -> None:
    """After a crash after step 12 and a resume from step 10; in a run with a rollback, once on each branch."""
    words = [*CUBE, "train.save_interval=10", "train.steps=24", "tracking.wandb=offline"]
    assert spiked(planted, tmp_path, *words, fault={"FAULT": "nan 5 11;kill 3 13"}).code != 0
    assert "resuming after step 10" in spiked(planted, tmp_path, *words).require_success().out
    for run_dir, steps, branches in ((tmp_path, range(1, 25), [0]), (rolled_back, range(1, 45), [0, 1])):
        number = run_id(run_dir)
        assert {path.name.rpartition("-")[2] for path in (run_dir / "wandb").glob("offline-run-*")} == {number}
        rows = [row for row in history(run_dir, number) if "train/loss" in row]
        logged = sorted((row["step"], row.get("train/rollbacks", 0)) for row in rows)
        last_of_first = FIRST if len(branches) > 1 else steps[-1]
        expected = {(step, 0) for step in range(1, last_of_first + 1)}
        expected |= {(step, 1) for step in range(33, steps[-1] + 1)} if len(branches) > 1 else set()
        assert logged == sorted(expected)
        (alert,) = alerts(run_dir, number)
        spike = 11 if run_dir == tmp_path else FIRST
        assert alert.title == f"Spike at step {spike}"
        assert any(row["step"] == spike and "spike/loss" in row for row in history(run_dir, number))


CLEAN = {
    "gpt": ("pretrain_gpt", []),
    "llama": ("pretrain_gpt", ["model=llama_tiny", "model.num_query_groups=1", "train.precision=bf16"]),
    "bert": ("pretrain_bert", ["model=bert_tiny"]),
    "t5": ("pretrain_t5", ["model=t5_tiny", "model.head_size=16", "data.seq_length=48"]),
    "ramp": (
        "pretrain_gpt",
        ["train.batch_ramp.start=4", "train.batch_ramp.increment=4", "train.batch_ramp.samples=200"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CLEAN))
def test_no_false_alarm(name: str, tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """Each case with three seeds; the small batches are the noisiest."""
    script, words = CLEAN[name]
    sweep = ["train.seed=1,2,3", "train.steps=80", "train.save_interval=0", "train.eval_interval=0"]
    warm_up = ["optimizer.learning_rate=3e-3", "optimizer.warmup_steps=10"]
    run_warm(tiny("clean", *words, *sweep, *warm_up), script=script).require_success()
    folders = [path.parent for path in tmp_path.rglob(METRICS_FILE)]
    assert len(folders) == 3
    for folder in folders:
        assert len(metrics(folder)) == 80
        assert events(folder, "spike") == []


@pytest.mark.slow
def test_a_new_loss_term_is_no_spike(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """After a change of the loss, steps are compared only with steps after it, in that attempt and in the next one."""
    settings = ["stability=skip_step", "train.save_interval=30", "train.eval_interval=0", "optimizer.decay=constant"]
    run_warm(tiny("run", *settings, "train.steps=30")).require_success()
    for steps in (36, 40):
        finished = run_warm(tiny("run", *settings, "optimizer.z_loss_weight=100", f"train.steps={steps}"))
        line = "spikes      reset      new optimizer.z_loss_weight"
        assert (line in finished.require_success().out) is (steps == 36)
    assert events(tmp_path / "run", "spike") == []
    assert not any(row["skipped"] for row in metrics(tmp_path / "run").values())
