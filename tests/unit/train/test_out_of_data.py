"""A run whose passes over the data end before its steps: following the error's remedy works."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import OutOfDataError
from megatron_lite.optim.batch_ramp import BEGINNING, BatchSchedule
from megatron_lite.train import parts
from megatron_lite.train.run import _require_data
from tests.unit.remedies import obeys


def finish(config: RunConfig, samples: int) -> None:
    """A run on text of so many samples."""
    run: Any = SimpleNamespace(config=config, context=SimpleNamespace(is_writer=True))
    source: Any = SimpleNamespace(samples_in=lambda epochs: epochs * samples)
    _require_data(run, parts.last_step(run, source, BatchSchedule(config.train, BEGINNING)))


@obeys("megatron_lite/train/run.py:_require_data")
@pytest.mark.parametrize("samples", [20_000, 90, 7])
def test_passes_that_end_early(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "agreed", lambda answer: answer)
    config = RunConfig()
    config.data.max_epochs, config.train.steps, config.train.global_batch_size = 1, 5_000, 8
    with pytest.raises(OutOfDataError, match=r"raise data\.max_epochs, add text in a new train\.run_dir, or ") as error:
        finish(config, samples)
    finish(replace(config, data=replace(config.data, max_epochs=6_000)), samples)
    finish(config, 40_000)
    steps = re.search(r"set train\.steps=(\d+)$", str(error.value))
    if steps is not None:
        finish(replace(config, train=replace(config.train, steps=int(steps[1]))), samples)
    else:
        assert str(error.value).endswith("or lower train.global_batch_size")
        train = replace(config.train, steps=7, global_batch_size=1)
        finish(replace(config, train=train), samples)
