"""A stop saves what is finished and sound, unless it is saved: whatever lies there under the step's name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from megatron_lite.errors import RunEnd
from megatron_lite.train.run import _stop


@pytest.mark.parametrize(
    ("newest_step", "is_sound", "is_saved"),
    [(10, True, True), (17, True, False), (10, False, False)],
    ids=["resumed from 10: the folder of step 17 is damaged", "saved, or resumed from", "weights may be no numbers"],
)
def test_stop_saves_what_is_sound_and_not_saved(
    newest_step: int, is_sound: bool, is_saved: bool, tmp_path: Path
) -> None:
    (tmp_path / "step_00000017").mkdir()
    save = Mock(checkpoints=SimpleNamespace(newest_step=newest_step), is_sound=is_sound)
    run = SimpleNamespace(checkpoints=tmp_path, context=SimpleNamespace(is_writer=False))
    trainer = SimpleNamespace(finished_step=17)
    assert _stop(run, Mock(), trainer, save, Mock()) is RunEnd.PREEMPTED
    assert [call.args for call in save.at.call_args_list] == ([(trainer, 17)] if is_saved else [])
