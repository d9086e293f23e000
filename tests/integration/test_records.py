"""On resume, real runs compare their metrics.jsonl with what the checkpoint recorded about it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from megatron_lite.checkpoint.folder import newest_logged
from megatron_lite.observe.metrics import EVENTS_FILE, METRICS_FILE, read_metrics
from megatron_lite.observe.run_folder import RunFolder
from tests.integration.runs import TINY, launch, run

SECRETS = ("HF_TOKEN", "AWS_SESSION_TOKEN", "DB_PASS", "SLURM_JOB_COMMENT", "PASSED")


@pytest.mark.slow
def test_a_damaged_record_and_configuration_are_reported_and_do_not_stop_a_run(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment is full of secrets and the umask private: no secret and no public file gets into the folder."""
    for name in SECRETS:
        monkeypatch.setenv(name, f"planted-{name}")
    before = os.umask(0o077)
    try:
        run_dir = tmp_path / "run"
        words = [
            *TINY,
            *corpus,
            f"train.run_dir={run_dir}",
            "launcher.pass_environment=[PASSED]",
            "train.save_interval=4",
        ]
        run(launch(*words, "train.steps=4")).require_success()  # a fork of the warm server would have its umask
        logged = newest_logged(run_dir)
        assert logged is not None
        assert (logged.lines, logged.steps) == (4, ((1, 4, 1),))
        metrics = run_dir / METRICS_FILE
        text = metrics.read_bytes().splitlines(keepends=True)
        metrics.write_bytes(text[0] + bytes(len(text[1]) + len(text[2])) + text[3])
        (frozen,) = run_dir.glob("config-*.yaml")
        whole = frozen.read_bytes()
        frozen.write_bytes(whole.replace(b"num_layers", b"oum_layers", 1))
        run(launch(*words, "train.steps=6", "tracking.plot=true")).require_success()
        assert frozen.read_bytes() == whole
        lost = [event for event in read_metrics(run_dir / EVENTS_FILE) if event["event"] == "metrics_lost"]
        assert [event["ranges"] for event in lost] == [["2-4"]], "zeros joined the lines of steps 2, 3 and 4"
        assert [gap.as_text for gap in RunFolder.read(run_dir).history.gaps] == ["2-4"]
        assert "lacks lines that had been written: steps 2 to 4" in (run_dir / "report.html").read_text()
    finally:
        os.umask(before)
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert [path for path in files if b"planted" in path.read_bytes()] == []
    assert [path for path in run_dir.rglob("*") if stat.S_IMODE(path.stat().st_mode) & 0o077] == []
