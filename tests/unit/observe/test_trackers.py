"""Trackers: one truth, isolated views, one wandb run for a run folder, and no secrets."""

from __future__ import annotations

import math
import re
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import wandb

from megatron_lite.config.schema import RunConfig, WandbMode
from megatron_lite.errors import ConfigError
from megatron_lite.observe.metrics import read_metrics
from megatron_lite.observe.numeric import numbers
from megatron_lite.observe.panels import PANELS
from megatron_lite.observe.trackers import Trackers, build_trackers
from megatron_lite.observe.wandb_record import Alert, alerts, history
from megatron_lite.observe.wandb_tracker import WandbTracker, has_api_key, resolve_mode, run_id
from tests.unit.remedies import obeys


class Recorder:
    def __init__(self, fails_at: int | None = None) -> None:
        self.steps: list[int] = []
        self.fails_at = fails_at

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if step == self.fails_at:
            raise OSError("no route to host")
        self.steps.append(step)

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None: ...

    def alert(self, title: str, text: str) -> None: ...

    def rewind(self, step: int, rollbacks: int) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> None: ...


def test_only_the_writer_writes(tmp_path: Path) -> None:
    trackers = build_trackers(RunConfig(), tmp_path, is_writer=False)
    trackers.log(1, {"loss": 1.0})
    trackers.finish({})
    assert list(tmp_path.iterdir()) == []


def test_jsonl_is_always_there(tmp_path: Path) -> None:
    trackers = build_trackers(RunConfig(), tmp_path, is_writer=True)
    trackers.event("start", 0, {"attempt": 1})
    trackers.log(1, {"loss": 1.0})
    trackers.finish({})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    assert [entry["event"] for entry in read_metrics(tmp_path / "events.jsonl")] == ["start"]


def test_a_failing_view_is_switched_off_once() -> None:
    truth, broken, healthy, lines = Recorder(), Recorder(fails_at=2), Recorder(), []
    trackers = Trackers([truth], [broken, healthy], lines.append)
    for step in (1, 2, 3):
        trackers.log(step, {})
    assert (truth.steps, broken.steps, healthy.steps) == ([1, 2, 3], [1], [1, 2, 3])
    assert lines == ["Recorder is off for the rest of the run: no route to host"]


def test_a_failing_truth_stops_the_run() -> None:
    with pytest.raises(OSError, match="no route"):
        Trackers([Recorder(fails_at=1)], []).log(1, {})


def test_charts_get_numbers_only() -> None:
    assert numbers({"a": 1, "b": 2.5, "c": True, "d": "x", "e": None, "f": math.inf}) == {
        "a": 1,
        "b": 2.5,
        "f": math.inf,
    }


def test_nested_figures_get_names() -> None:
    layers = {"embedding": 0.5, "layers.0": math.inf, "note": "x"}
    assert numbers({"layer_grad_norm": layers, "stage_memory_bytes": [7, 9], "kinds": ["loss"]}) == {
        "layer_grad_norm/embedding": 0.5,
        "layer_grad_norm/layers.0": math.inf,
        "stage_memory_bytes/0": 7,
        "stage_memory_bytes/1": 9,
    }


def test_tensorboard_hides_replayed_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = RunConfig()
    config.tracking.tensorboard = True
    for resume_step, steps, loss in ((0, range(1, 6), 1.0), (3, range(4, 7), 2.0)):
        trackers = build_trackers(config, tmp_path, True, resume_step=resume_step)
        for step in steps:
            trackers.log(step, {"loss": loss})
        trackers.event("evaluation", steps[-1], {"validation_loss": 3.0})
        trackers.finish({})
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
        (5, 2.0),
        (6, 2.0),
    ]
    assert events.Scalars("evaluation/validation_loss")[-1].step == 6


def test_tensorboard_hides_what_a_rollback_took_back_and_has_the_panels(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import metadata
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    config = RunConfig()
    config.tracking.tensorboard = True
    trackers = build_trackers(config, tmp_path, True)
    for step, loss in ((1, 1.0), (2, 9.0), (3, 9.0)):
        trackers.log(step, {"loss": loss, "layer_grad_norm": {"layers.0": 1.0}})
    trackers.rewind(1, 1)
    for step in (2, 3):
        trackers.log(step, {"loss": 2.0, "rollbacks": 1})
    trackers.finish({})
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 2.0)]
    (tensor,) = events.Tensors(metadata.CONFIG_SUMMARY_TAG)[-1:]
    layout = Layout.FromString(tensor.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert set(charts) == {panel.title for panel in PANELS}
    assert re.match(charts["Gradient norm by layer"][0], "train/layer_grad_norm/layers.0")


def test_wandb_resumes_one_run_and_logs_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = RunConfig()
    config.tracking.wandb = WandbMode.offline
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for resume_step, steps in ((0, range(1, 4)), (1, range(2, 5))):
        trackers = build_trackers(config, run_dir, True, resume_step=resume_step)
        trackers.event("resume", resume_step, {"world_size": 8})
        for step in steps:
            trackers.log(step, {"loss": 10.0 * step})
        trackers.event("evaluation", 3, {"validation_loss": 2.0})
        trackers.finish({"loss": 1.0})
        wandb.teardown()  # the next attempt is another process
        time.sleep(1.0)  # wandb names the folder of an attempt by its second
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == 2
    rows = list(history(run_dir, run_id(run_dir)))
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        (1, 10.0),
        (2, 20.0),
        (3, 30.0),
        (4, 40.0),
    ]
    assert [row["step"] for row in rows if "evaluation/validation_loss" in row] == [3]
    assert [row["step"] for row in rows if "resume/world_size" in row] == [0, 1]


def test_wandb_gets_late_what_its_record_has_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that ends a job kills wandb's own process as well, with what it had not written yet."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = RunConfig()
    for attempt, mode in enumerate((WandbMode.disabled, WandbMode.offline, WandbMode.offline)):
        config.tracking.wandb = mode
        trackers = build_trackers(config, tmp_path, True, resume_step=3 * attempt)
        for step in range(3 * attempt + 1, 3 * attempt + 4):
            trackers.log(step, {"loss": 10.0 * step})
        trackers.event("evaluation", 3, {"validation_loss": 2.0})
        trackers.finish({})
        wandb.teardown()
        time.sleep(1.0)  # wandb names the folder of an attempt by its second
    rows = list(history(tmp_path, run_id(tmp_path)))
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        (step, 10.0 * step) for step in range(1, 10)
    ]
    assert [row["step"] for row in rows if "evaluation/validation_loss" in row] == [3]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = RunConfig()
    config.tracking.wandb = WandbMode.offline
    return config


def end_attempt() -> None:
    """The next one is another process, and wandb names its folder by its second."""
    wandb.teardown()
    time.sleep(1.0)


def spike(trackers: Trackers, step: int) -> None:
    trackers.log(step, {"loss": 9.0, "spike": True})
    told = {"title": f"loss spike at step {step}", "text": f"loss 9.0 at step {step}, usual is 5.2"}
    trackers.event("spike", step, {"kinds": ["loss"], "loss": 9.0, "action": "warn", **told})
    trackers.alert(**told)


def test_spikes_and_their_alerts_are_in_wandb_once_after_a_crash(tmp_path: Path, offline: RunConfig) -> None:
    """Killed after step 12, which was a spike; the resume goes on from 10 and comes through it again."""
    for resume_step, steps in ((0, range(1, 13)), (10, range(11, 16))):
        trackers = build_trackers(offline, tmp_path, True, resume_step=resume_step)
        for step in steps:
            if step in (5, 12):
                spike(trackers, step)
            else:
                trackers.log(step, {"loss": 5.0, "layer_grad_norm": {"layers.0": 0.5}})
        if resume_step:
            trackers.finish({})
        end_attempt()
    rows = list(history(tmp_path, run_id(tmp_path)))
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 16))
    assert [row["step"] for row in rows if "spike/loss" in row] == [5, 12]
    assert rows[0]["train/layer_grad_norm/layers.0"] == 0.5
    assert list(alerts(tmp_path, run_id(tmp_path))) == [
        Alert(f"loss spike at step {step}", f"loss 9.0 at step {step}, usual is 5.2", "WARN") for step in (5, 12)
    ]


@pytest.mark.parametrize("reach_wandb", [True, False], ids=["recorded", "caught up"])
def test_wandb_separates_branches_after_a_rollback_and_a_crash(
    tmp_path: Path, offline: RunConfig, reach_wandb: bool
) -> None:
    """Spike at 6, back to 4, on to 7, killed there; the resume goes on from 4 in the same branch."""
    offline.tracking.wandb = WandbMode.offline if reach_wandb else WandbMode.disabled
    trackers = build_trackers(offline, tmp_path, True)
    for step in range(1, 6):
        trackers.log(step, {"loss": 5.0})
    trackers.event("evaluation", 5, {"validation_loss": 5.5})
    spike(trackers, 6)
    trackers.event("rollback", 6, {"to_step": 4, "first_sample": 16, "stop_sample": 24, "rollbacks": 1})
    trackers.rewind(4, 1)
    for step in range(5, 8):
        trackers.log(step, {"loss": 4.0, "rollbacks": 1})
        if step == 5:
            trackers.event("evaluation", 5, {"validation_loss": 4.5})
    end_attempt()
    offline.tracking.wandb = WandbMode.offline
    trackers = build_trackers(offline, tmp_path, True, resume_step=4, rollbacks=1)
    for step in range(5, 10):
        trackers.log(step, {"loss": 4.0, "rollbacks": 1})
        if step == 5:
            trackers.event("evaluation", 5, {"validation_loss": 4.5})
    trackers.finish({})
    end_attempt()
    rows = list(history(tmp_path, run_id(tmp_path)))
    steps = [(row["rollbacks"], row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    usual = [(0, step, 5.0) for step in range(1, 6)]
    assert sorted(steps) == [*usual, (0, 6, 9.0), *((1, step, 4.0) for step in range(5, 10))]
    evaluations = [row for row in rows if "evaluation/validation_loss" in row]
    assert [(row["rollbacks"], row["evaluation/validation_loss"]) for row in evaluations] == [(0, 5.5), (1, 4.5)]
    assert [(row["step"], row["rollbacks"]) for row in rows if "rollback/to_step" in row] == [(6, 1)]
    kept = [(entry["step"], entry["loss"]) for entry in read_metrics(tmp_path / "metrics.jsonl")]
    assert kept == [*((step, 5.0) for step in range(1, 5)), *((step, 4.0) for step in range(5, 10))]
    taken_back = [(entry["step"], entry["loss"]) for entry in read_metrics(tmp_path / "rolled_back.jsonl")]
    assert taken_back == [(5, 5.0), (6, 9.0)]


def test_a_record_that_was_cut_short_is_read_up_to_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = WandbTracker(tmp_path, mode="offline", project="p", name="n", config={})
    for step in range(1, 2000):
        tracker.log(step, {"loss": 1.0})
    tracker.finish({})
    wandb.teardown()
    (log,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    whole = log.read_bytes()
    assert [row["step"] for row in history(tmp_path, run_id(tmp_path))] == list(range(1, 2000))
    log.write_bytes(whole[: len(whole) // 2])
    steps = [row["step"] for row in history(tmp_path, run_id(tmp_path))]
    assert steps == list(range(1, len(steps) + 1))
    assert 500 < len(steps) < 1500


def test_without_a_network_wandb_goes_offline_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is there and a server that is not: the run goes on, and later figures still reach the folder."""
    started = []

    class FakeRun:
        url = "https://wandb.example.org/run"

        def define_metric(self, *arguments: Any, **keywords: Any) -> None: ...

    def init(**arguments: Any) -> FakeRun:
        started.append((arguments["mode"], arguments["resume"], arguments["id"]))
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("no route to host")
        return FakeRun()

    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "init", init)
    lines: list[str] = []
    WandbTracker(tmp_path, mode="auto", project="p", name="n", config={}, report=lines.append)
    identity = run_id(tmp_path)
    assert started == [("online", "allow", identity), ("offline", None, identity)]
    assert lines[0].startswith("wandb is not available (no route to host)")
    assert "k" * 40 not in "".join(lines)


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("online", {"WANDB_API_KEY": "k"}, "online"),
    ],
)
def test_mode(tmp_path: Path, mode: str, environment: dict[str, str], expected: str) -> None:
    assert resolve_mode(mode, {"HOME": str(tmp_path), **environment}) == expected


@obeys("megatron_lite/observe/wandb_tracker.py:resolve_mode")
def test_online_without_a_key_is_refused(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    message = r"needs an API key; run `wandb login`, set WANDB_API_KEY, or use tracking\.wandb=auto"
    with pytest.raises(ConfigError, match=message):
        resolve_mode("online", home)
    assert resolve_mode("auto", home) == "offline"
    assert resolve_mode("online", home | {"WANDB_API_KEY": "k"}) == "online"
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password abc\n")  # as `wandb login` does
    netrc.chmod(stat.S_IRUSR | stat.S_IWUSR)
    assert resolve_mode("online", home) == "online"


def test_key_in_the_netrc_file(tmp_path: Path) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password abc\n")
    netrc.chmod(stat.S_IRUSR | stat.S_IWUSR)
    assert has_api_key({"HOME": str(tmp_path)})
    assert not has_api_key({"HOME": str(tmp_path), "WANDB_BASE_URL": "https://wandb.example.org"})
    netrc.write_text("nonsense\n")
    assert not has_api_key({"HOME": str(tmp_path)})


def test_run_id_lives_in_the_run_folder(tmp_path: Path) -> None:
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first
    assert run_id(tmp_path / "other") != first


@obeys("megatron_lite/observe/trackers.py:_view")
@pytest.mark.parametrize(
    ("name", "module", "attribute"),
    [
        ("wandb", "megatron_lite.observe.wandb_tracker", "WandbTracker"),
        ("TensorBoard", "megatron_lite.observe.tensorboard_tracker", "TensorBoardTracker"),
    ],
)
def test_a_view_that_cannot_start_is_reported_and_left_out(
    name: str, module: str, attribute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a library raises, the run goes on, and its own files have the figures."""

    def fail(*arguments: object, **named: object) -> None:
        raise RecursionError("deep\nwithin")

    monkeypatch.setattr(f"{module}.{attribute}", fail)
    config = RunConfig()
    config.tracking.wandb = WandbMode.offline if name == "wandb" else WandbMode.disabled
    config.tracking.tensorboard = name != "wandb"
    told: list[str] = []
    trackers = build_trackers(config, tmp_path, True, report=told.append)
    trackers.log(1, {"loss": 2.0})
    trackers.finish({})
    assert told == [f"{name} cannot start: RecursionError: deep; the run continues without it"]
    assert (tmp_path / "metrics.jsonl").read_text()


def test_environment_that_wandb_does_not_take(
    tmp_path: Path, offline: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb checks all its variables at once, and raises what pydantic raises."""
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "soon")
    told: list[str] = []
    trackers = build_trackers(offline, tmp_path, True, report=told.append)
    trackers.log(1, {"loss": 2.0})
    assert len(told) == 1
    assert told[0].startswith("wandb cannot start: ")
