"""What steps are judged by, in a run that goes on, is resumed, or goes back."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from megatron_lite.config.derived import resolve
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import Precision, RunConfig
from megatron_lite.config.stability import OnSpike, StabilityConfig
from megatron_lite.engine.hooks import PendingUpdate
from megatron_lite.errors import DataError
from megatron_lite.observe.metrics import METRICS_FILE
from megatron_lite.observe.spikes import Judgement, SpikeKind
from megatron_lite.train.stability.spike_report import SpikeReport, SpikeReports
from megatron_lite.train.stability.watch import Spike, UpdateJudge, Watch, logged_statistics, needs_report, steps_kept

HIGH = 2.0**16


def config_of(precision: Precision) -> ResolvedConfig:
    config = RunConfig(stability=StabilityConfig(OnSpike.skip_step))
    config.train.precision = precision
    return resolve(config)


def write_metrics(run_dir: Path, count: int, **figures: Any) -> None:
    usual = {"loss": 3.0, "grad_norm": 1.0, "loss_scale": HIGH, "skipped": False, "spike": False}
    lines = [json.dumps({"step": step, **usual, **figures}) for step in range(1, count + 1)]
    (run_dir / METRICS_FILE).write_text("\n".join(lines) + "\n")


def resumed(config: ResolvedConfig, run_dir: Path, step: int, first: int = 1) -> tuple[Watch, UpdateJudge]:
    judge = UpdateJudge(config)
    watch = Watch(config, SimpleNamespace(meter=Mock()), judge, Mock(), Mock(), None, [])
    watch.replay(logged_statistics(config, run_dir, step, first))
    return watch, judge


def usual_update(loss_scale: float) -> PendingUpdate:
    return PendingUpdate(3.0, 1.0, loss_scale)


def test_a_resumed_fp16_run_goes_by_the_scale_that_it_has(tmp_path: Path) -> None:
    write_metrics(tmp_path, 30)
    _, judge = resumed(config_of(Precision.fp16), tmp_path, 30)
    assert not judge.judge(usual_update(HIGH))
    assert judge.judge(usual_update(HIGH / 64))


def test_a_run_that_went_back_goes_by_the_scale_of_the_checkpoint(tmp_path: Path) -> None:
    write_metrics(tmp_path, 30)
    watch, judge = resumed(config_of(Precision.fp16), tmp_path, 30)
    assert judge.judge(usual_update(HIGH / 64))
    watch.rewind(20)
    assert not judge.judge(usual_update(HIGH))


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_the_loss_scale_of_an_earlier_precision_says_nothing(precision: Precision, tmp_path: Path) -> None:
    write_metrics(tmp_path, 30)
    _, judge = resumed(config_of(precision), tmp_path, 30)
    assert not judge.judge(usual_update(1.0))


def test_a_dropped_spike_is_no_overflow_in_the_record(tmp_path: Path) -> None:
    config = config_of(Precision.fp16)
    write_metrics(tmp_path, 2, skipped=True, spike=True)
    assert not any(statistics.overflowed for statistics in logged_statistics(config, tmp_path, 2))
    write_metrics(tmp_path, 2, skipped=True)
    assert all(statistics.overflowed for statistics in logged_statistics(config, tmp_path, 2))


def test_steps_from_before_a_change_of_the_loss_are_no_measure(tmp_path: Path) -> None:
    """Such as after optimizer.z_loss_weight=0 -> 0.1, also in later attempts; without a change they are one."""
    write_metrics(tmp_path, 60)
    config, other_loss = config_of(Precision.fp32), PendingUpdate(30.0, 100.0, 1.0)
    for step, first, is_spike in ((60, 1, True), (60, 61, False), (60, 55, False), (60, 31, True)):
        _, judge = resumed(config, tmp_path, step, first)
        assert judge.judge(other_loss) is is_spike, first
    assert [statistics.step for statistics in logged_statistics(config, tmp_path, 60, 55)] == list(range(55, 61))


def test_ranks_are_sent_no_more_than_is_remembered(tmp_path: Path) -> None:
    config = config_of(Precision.fp32)
    write_metrics(tmp_path, 1000)
    found = logged_statistics(config, tmp_path, 900)
    assert [statistics.step for statistics in found] == list(range(901 - steps_kept(config), 901))


@pytest.mark.parametrize(
    ("before", "now", "reported"),
    [
        (None, [SpikeKind.loss], True),
        ([SpikeKind.loss], [SpikeKind.loss, SpikeKind.grad_norm], False),
        ([SpikeKind.loss], [SpikeKind.not_finite], True),
        ([SpikeKind.not_finite], [SpikeKind.not_finite], False),
        ([SpikeKind.not_finite], [SpikeKind.loss], False),
    ],
)
def test_which_of_consecutive_spikes_is_reported(
    before: list[SpikeKind] | None, now: list[SpikeKind], reported: bool
) -> None:
    record = Mock()
    earlier = None if before is None else Spike(record, Judgement(tuple(before)))
    assert needs_report(Spike(record, Judgement(tuple(now))), earlier) is reported


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), DataError("an index is damaged")])
def test_a_spike_report_that_cannot_be_written_ends_no_run(error: Exception, tmp_path: Path) -> None:
    result = SimpleNamespace(loss=9.0, grad_norm=1.0, loss_scale=1.0)
    record = SimpleNamespace(step=7, result=result, learning_rate=1e-3)
    judgement = Judgement((SpikeKind.loss,), 3.0, 12.0, 1.0, 0.0)
    spike_report = SpikeReport(record, judgement, "warn", 1, [0, 1], [9.0, 8.0], {})
    trackers, console = Mock(), Mock()
    provenance = Mock()
    provenance.documents.side_effect = error
    SpikeReports(tmp_path, provenance, trackers, console, 4).open(spike_report)
    lines = [call.args[0] for call in console.print.call_args_list]
    assert lines[0].endswith("the run continues without it")
    assert lines[1].startswith("spike at step 7: loss 9.000, usually 3.000 (12 deviations); ")
    assert trackers.event.call_args.args[:2] == ("spike", 7)
    assert trackers.alert.call_count == 1
    assert not (tmp_path / spike_report.name).exists()
