"""A stop saves what is finished and finite, unless saved: whatever lies there under the step's name. An evaluation
that it broke off is made up for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from megatron_lite.config.schema import TrainConfig
from megatron_lite.errors import RunEnd
from megatron_lite.observe.metrics import EVENTS_FILE
from megatron_lite.observe.metrics_writer import EventWriter
from megatron_lite.train.run import _is_evaluated, _stop


@pytest.mark.parametrize(
    ("newest_step", "is_finite", "is_saved"),
    [(10, True, True), (17, True, False), (10, False, False)],
    ids=["resumed from 10: the folder of step 17 is damaged", "saved, or resumed from", "weights may be NaN"],
)
def test_stop_saves_finite_weights_that_are_not_saved(
    newest_step: int, is_finite: bool, is_saved: bool, tmp_path: Path
) -> None:
    (tmp_path / "step_00000017").mkdir()
    save = Mock(checkpoints=SimpleNamespace(newest_step=newest_step), is_finite=is_finite)
    run = SimpleNamespace(checkpoints=tmp_path, context=SimpleNamespace(is_writer=False))
    trainer = SimpleNamespace(finished_step=17)
    assert _stop(run, Mock(), trainer, save, Mock()) is RunEnd.PREEMPTED
    assert [call.args for call in save.at.call_args_list] == ([(trainer, 17)] if is_saved else [])


def test_an_evaluation_ahead_of_a_rollback_is_of_other_weights(tmp_path: Path) -> None:
    train = TrainConfig(steps=100, eval_interval=20)
    run = SimpleNamespace(config=SimpleNamespace(train=train), folder=tmp_path)
    events = EventWriter(tmp_path / EVENTS_FILE)
    assert not _is_evaluated(run, 40)
    events.write("evaluation", 40, {"validation_loss": 3.0})
    assert _is_evaluated(run, 40)
    events.write("rollback", 43, {"to_step": 30})
    assert not _is_evaluated(run, 40)
    events.write("evaluation", 40, {"validation_loss": 3.1})
    events.write("rollback", 59, {"to_step": 40})
    assert _is_evaluated(run, 40)
