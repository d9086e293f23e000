"""No secret of the environment, of private files or of refused settings gets into a run folder or into an output."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.cli import main
from launch.preparation import run_folder
from megatron_lite.observe.trackers import build_trackers
from megatron_lite.parallel.stores import local_store
from tests.unit.launch.test_launch_plan import plan_of

NAMES = ("HF_TOKEN", "AWS_SESSION_TOKEN", "DB_PASS", "SLURM_JOB_ACCOUNT", "SLURM_JOB_COMMENT", "PASSED", "UNNAMED")


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A place where all that a user may hold secret says "planted", under a private umask."""
    for name in NAMES:
        monkeypatch.setenv(name, f"planted-{name}")
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / ".netrc").write_text("machine host login me password planted-netrc\n")
    (home / ".deepspeed_env").write_text("OTHER=planted-deepspeed\n")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work" / "hosts").write_text("n0 slots=1\nn1 slots=1\n")
    before = os.umask(0o077)
    yield tmp_path / "work"
    os.umask(before)


def assert_nothing_planted(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if b"planted" in path.read_bytes()] == []
    wide = [path for path in folder.rglob("*") if stat.S_IMODE(path.stat().st_mode) & 0o077 and path.name != "hosts"]
    assert wide == []


@pytest.mark.parametrize(
    "words",
    [
        ["launcher=local", "parallel=dp2"],
        ["launcher=torchrun", "parallel=dp2"],
        ["launcher=deepspeed", "launcher.hostfile=hosts", "launcher.nodes=2", "parallel=dp2"],
        ["launcher=slurm", "launcher.nodes=2", "parallel=dp2", "launcher.setup=['wandb login \"$HF_TOKEN\"']"],
    ],
    ids=lambda words: words[0],
)
def test_what_a_launcher_writes_and_shows(planted: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    words = [*words, "train.run_dir=run", "launcher.pass_environment=[PASSED,DB_PASS]", "launcher.device=cpu"]
    with run_folder(plan_of(*words)):
        pass
    assert_nothing_planted(planted)
    assert main(["pretrain_gpt", *words, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "planted" not in shown.out + shown.err
    assert "taken from this environment for every rank: PASSED, DB_PASS" in shown.out


def test_what_wandb_records(planted: Path) -> None:
    config = plan_of("tracking.wandb=offline", "train.run_dir=run", "launcher.environment={A: other}").config
    config.launcher.setup = ["echo other"]
    trackers = build_trackers(config, planted / "run", is_writer=True)
    trackers.log(1, {"loss": 1.0})
    trackers.finish({})
    files = [path for path in (planted / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert_nothing_planted(planted / "run")
    assert [path for path in files if b"echo other" in path.read_bytes()] == []


def test_the_store_of_one_machine_listens_on_loopback_alone() -> None:
    def listening() -> set[tuple[str, int]]:
        found = psutil.Process().net_connections("inet")
        return {(one.laddr.ip, one.laddr.port) for one in found if one.status == psutil.CONN_LISTEN}

    before = listening()
    store = local_store("127.0.0.1", 0, 1, is_master=True)
    assert listening() - before == {("127.0.0.1", store.port)}
    store.set("key", "value")
    assert local_store("127.0.0.1", store.port, 1, is_master=False).get("key") == b"value"
