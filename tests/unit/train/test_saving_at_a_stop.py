"""A stop saves what is finished, unless it is saved: whatever lies there under the step's name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from megatron_lite.errors import RunEnd
from megatron_lite.train.run import _stop


@pytest.mark.parametrize(
    ("newest_step", "is_saved"),
    [(10, True), (17, False)],
    ids=["resumed from 10: the folder of step 17 is damaged", "step 17 is saved, or was resumed from"],
)
def test_folder_that_the_resume_has_passed_over_is_replaced(newest_step: int, is_saved: bool, tmp_path: Path) -> None:
    (tmp_path / "step_00000017").mkdir()
    save = Mock(checkpoints=SimpleNamespace(newest_step=newest_step))
    run = SimpleNamespace(checkpoints=tmp_path, context=SimpleNamespace(is_writer=False))
    trainer = SimpleNamespace(finished_step=17)
    assert _stop(run, Mock(), trainer, save, Mock()) is RunEnd.PREEMPTED
    assert [call.args for call in save.at.call_args_list] == ([(trainer, 17)] if is_saved else [])
