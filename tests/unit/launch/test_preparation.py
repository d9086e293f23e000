"""The data of a run that goes on: other names of the same tokens are fine, others are refused before a rank starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launch.preparation import ready_data
from megatron_lite.config.compose import compose
from megatron_lite.config.derived import resolve
from megatron_lite.config.frozen import freeze
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.errors import CheckpointError, ConfigError, DataError
from megatron_lite.observe.metrics import EVENTS_FILE, METRICS_FILE
from megatron_lite.observe.metrics_writer import EventWriter

Ready = Callable[[ResolvedConfig], list[str]]


@pytest.fixture
def config(tmp_path: Path) -> ResolvedConfig:
    (tmp_path / "a.txt").write_text("\n\n".join(f"document {i} of apples and {i * i} pears" for i in range(80)))
    words = [
        f"data.source={tmp_path / 'a.txt'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.validation_fraction=0.2",
    ]
    words += ["data.tokenizer_vocab_size=400", f"train.run_dir={tmp_path / 'run'}"]
    return resolve(compose("pretrain_gpt", words))


@pytest.fixture
def attempt(config: ResolvedConfig, tmp_path: Path) -> Path:
    """A run folder whose only attempt has read the data, and has trained nothing yet."""
    prepared = prepare(config, report=lambda line: None)
    run_dir = tmp_path / "run"
    frozen = freeze(config, run_dir)
    EventWriter(run_dir / EVENTS_FILE).write(
        "start", 0, {"data_fingerprint": prepared.fingerprint, "config": frozen.name}
    )
    return run_dir


def with_source(config: ResolvedConfig, source: object) -> ResolvedConfig:
    return replace(config, data=replace(config.data, source=source))


def test_a_run_goes_on_with_moved_data_and_not_with_other_data(config: ResolvedConfig, attempt: Path) -> None:
    said: list[str] = []
    (attempt / METRICS_FILE).write_text('{"step": 1}\n')
    moved = shutil.copy(attempt.parent / "a.txt", attempt.parent / "b.txt")
    assert ready_data(with_source(config, [str(moved)]), said.append).is_dir()
    other = attempt.parent / "other.txt"
    other.write_text(moved.read_text().replace("apples", "plums"))
    with pytest.raises(
        ConfigError, match=r"data\.source=.*other\.txt cannot continue from .*a\.txt of the run in train"
    ):
        ready_data(with_source(config, str(other)), said.append)
    assert said == []
    os.remove(attempt.parent / "a.txt")
    with pytest.raises(CheckpointError, match=r"data\.source=.*other\.txt cannot continue from .*a\.txt of the run in"):
        ready_data(with_source(config, str(other)), said.append)
    with pytest.raises(DataError, match=r"a\.txt is not a file"):
        ready_data(config, said.append)


def test_a_run_that_has_trained_nothing_may_take_other_data(config: ResolvedConfig, attempt: Path) -> None:
    other = attempt.parent / "other.txt"
    other.write_text((attempt.parent / "a.txt").read_text().replace("apples", "plums"))
    assert ready_data(with_source(config, str(other)), lambda line: None).is_dir()
