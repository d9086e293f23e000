"""Errors of launching: following their remedies works."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launch import local, machine, scripts, usage
from launch.cli import main
from launch.deepspeed import ENV_FILE, DeepSpeedLauncher, private_file
from launch.launching import resolve_for_this_machine
from launch.program import installed
from launch.slurm import scheduler
from launch.slurm.launcher import SlurmLauncher, refuse_second_job
from megatron_lite.config.compose import compose
from megatron_lite.config.frozen import freeze
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.errors import ConfigError, LaunchError, RunEnd
from megatron_lite.observe.markers import STOP_FILE, leave_marker
from tests.unit.launch.holding import held
from tests.unit.remedies import obeys

Capture = pytest.CaptureFixture[str]
SLURM = ["launcher=slurm", "launcher.nodes=2", "launcher.gpus_per_node=4", "parallel=dp2_tp2_pp2"]
ONE_HOST = "launcher.node_rank=0"


@dataclass
class Slurm:
    """Knows its jobs, and one partition of four nodes."""

    states: dict[int, str] = field(default_factory=dict)

    def __call__(self, *argv: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        answer = getattr(self, argv[0])(*argv[1:], stdin=stdin)
        return subprocess.CompletedProcess(argv, int(isinstance(answer, ValueError)), str(answer), str(answer))

    def sbatch(self, option: str, *script: str, stdin: str | None) -> str | ValueError:
        text = Path(script[0]).read_text() if stdin is None else stdin
        nodes = re.search(r"--nodes=(\d+)", text)
        assert nodes is not None
        if int(nodes[1]) > 4:
            return ValueError("sbatch: error: Requested node configuration is not available")
        if option == "--parsable":
            self.states[len(self.states) + 1] = "PENDING"
        return str(len(self.states))

    def squeue(self, *options: str, stdin: None) -> str:
        (asked,) = (option.partition("=")[2].split(",") for option in options if option.startswith("--jobs="))
        return "".join(f"{number}|{self.states[int(number)]}|None|n1\n" for number in asked)

    def scancel(self, *numbers: str, stdin: None) -> str:
        self.states |= dict.fromkeys(map(int, numbers), "CANCELLED")
        return ""

    def scontrol(self, command: str, *words: str, stdin: None) -> str:
        assert command == "requeue"
        self.states[int(words[0])] = "PENDING"
        return ""


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    cluster = Slurm()
    monkeypatch.setattr(scheduler, "_run", cluster)
    return cluster


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Of a run that was launched; a shell would take its name for two words."""
    path = tmp_path / "my run"
    freeze(config_of(path), path)
    return path


def config_of(run_dir: Path, *words: str) -> ResolvedConfig:
    settings = ["train.steps=200", f"train.run_dir={run_dir}", *words]
    return resolve_for_this_machine(compose("pretrain_gpt", settings))


def submitted(run_dir: Path, *words: str) -> None:
    SlurmLauncher().run(SlurmLauncher().plan(config_of(run_dir, *SLURM, *words)))


def refused(capsys: Capture, *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 2
    return capsys.readouterr().err


def named_command(message: str) -> list[str]:
    """The words after `python -m launch`."""
    found = re.search(r"`python -m launch ([^`]*)`", message)
    assert found is not None, message
    return shlex.split(found[1])


@obeys("launch/follow.py:main", "launch/follow.py:cancel", "launch/follow.py:logs")
def test_following_a_run(run_dir: Path, capsys: Capture) -> None:
    for words, told in (
        (["status", "--follow", str(run_dir)], "leave it out"),
        (["status", "--all", str(run_dir)], "leave it out"),
        (["status"], "write runs/NAME"),
        (["status", str(run_dir), str(run_dir)], "write runs/NAME"),
    ):
        assert told in refused(capsys, *words)
        assert main(["status", str(run_dir)]) == 0
    for command in ("cancel", "logs"):
        assert main(named_command(refused(capsys, command, str(run_dir)))) == 0
        assert "not running" in capsys.readouterr().out


@obeys("launch/follow.py:requeue")
def test_requeueing(run_dir: Path, slurm: Slurm, capsys: Capture) -> None:
    assert "start it as before" in refused(capsys, "requeue", str(run_dir))
    submitted(run_dir)
    message = refused(capsys, "requeue", str(run_dir))
    assert main(named_command(message)) == 0
    assert main(["requeue", str(run_dir)]) == 0
    slurm.states = dict.fromkeys(slurm.states, "COMPLETED")
    with held(run_dir):
        message = refused(capsys, "requeue", str(run_dir))
        assert main(named_command(message)) == 0
        assert (run_dir / STOP_FILE).exists()
    leave_marker(run_dir, RunEnd.DONE, "", 200)
    assert "submit it with more train.steps" in refused(capsys, "requeue", str(run_dir))
    before = len(slurm.states)
    submitted(run_dir, "train.steps=300")
    assert len(slurm.states) == before + 1


@obeys("launch/slurm/launcher.py:refuse_second_job")
def test_a_second_job_of_a_run_folder(run_dir: Path, slurm: Slurm) -> None:
    submitted(run_dir)
    with pytest.raises(LaunchError, match=r"wait for it, end it .*, or give another train\.run_dir") as error:
        submitted(run_dir)
    refuse_second_job(run_dir.with_name("other"))
    assert main(named_command(str(error.value))) == 0
    submitted(run_dir)
    slurm.states = dict.fromkeys(slurm.states, "COMPLETED")
    submitted(run_dir)


@obeys("launch/slurm/scheduler.py:rehearse", "launch/slurm/scheduler.py:_refused")
def test_a_job_that_slurm_refuses(run_dir: Path, slurm: Slurm) -> None:
    def plan(nodes: int) -> tuple[str, Callable[[], int]]:
        launcher = SlurmLauncher()
        data = ["parallel=dp1", f"parallel.data_parallel_size={nodes}", "train.global_batch_size=80"]
        made = launcher.plan(config_of(run_dir, *SLURM, *data, f"launcher.nodes={nodes}", "launcher.gpus_per_node=1"))
        assert made.batch_script is not None
        return made.files[made.batch_script], lambda: launcher.run(made)

    text, run = plan(5)
    with pytest.raises(LaunchError, match=r"not available.*; change launcher.nodes"):
        scheduler.rehearse(text)
    with pytest.raises(LaunchError, match=r"Requested node configuration.*correct what it names"):
        run()
    text, run = plan(4)
    scheduler.rehearse(text)
    assert run() == 0


@obeys("launch/slurm/scheduler.py:_run")
def test_a_slurm_that_is_not_there(run_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "squeue"
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(LaunchError, match=r"log in to the cluster .--dry-run shows the job anywhere"):
        scheduler.jobs([1])
    assert main(["pretrain_gpt", *SLURM, f"train.run_dir={run_dir}", "--dry-run"]) == 0
    command.write_text("#!/bin/sh\nexec /bin/sleep 600\n")
    command.chmod(0o700)
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "ANSWER_SECONDS", 0.05)
        with pytest.raises(LaunchError, match=r"try again later"):
            scheduler.jobs([1])
    command.write_text("#!/bin/sh\necho '1|PENDING|None|n1'\n")
    assert [job.number for job in scheduler.jobs([1])] == [1]


@obeys("launch/deepspeed.py:private_file")
def test_variables_that_a_shell_would_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "a b")
    hosts = tmp_path / "hosts"
    hosts.write_text("n1 slots=1\nn2 slots=1\n")
    words = ["launcher=deepspeed", "parallel=dp2", f"launcher.hostfile={hosts}", "launcher.nodes=2"]
    words += ["launcher.device=cpu", "launcher.num_processes=2"]
    passing = "launcher.pass_environment=[A_KEY]"
    with pytest.raises(ConfigError, match=r"leave it out and set it on each host .*, or start .* launcher.node_rank"):
        private_file("", config_of(tmp_path, *words, passing))
    private_file("", config_of(tmp_path, *words, "launcher.pass_environment=[]"))
    monkeypatch.setattr("launch.deepspeed.installed", lambda *names: "deepspeed")
    plans = [DeepSpeedLauncher().plan(config_of(tmp_path, *words, passing, *more)) for more in ([], [ONE_HOST])]
    assert [tmp_path / ENV_FILE in plan.files for plan in plans] == [True, False], "nothing for a shell to read"


@obeys("launch/local.py:_start_ranks")
def test_processes_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 2

    def limited(body: Callable[[], int]) -> int:
        if len(started) == limit:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(len(started))
        return started[-1]

    started: list[int] = []
    monkeypatch.setattr(local, "start", limited)
    monkeypatch.setattr(local.Children, "end", lambda self: started.clear())
    with pytest.raises(LaunchError, match=r"only 2 could be started .*; use a smaller layout, or raise the limits"):
        local._start_ranks(lambda: 0, [{}, {}, {}], lambda: None)
    assert local._start_ranks(lambda: 0, [{}, {}], lambda: None).pids == [0, 1]
    limit = 3
    started.clear()
    assert local._start_ranks(lambda: 0, [{}, {}, {}], lambda: None).pids == [0, 1, 2]


@obeys("launch/machine.py:_torch_has_cuda", "launch/machine.py:free_port", "launch/program.py:installed")
def test_what_is_missing_on_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(LaunchError, match=r"run `make install`, or `pip install torch`"):
            machine._torch_has_cuda()
    machine._torch_has_cuda()  # installed
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    words = ["pretrain_gpt", "launcher.device=cpu", f"train.run_dir={tmp_path}", "--dry-run"]
    assert "or on one machine use launcher=local" in refused(capsys, *words, "launcher=torchrun")
    assert main([*words, "launcher=local"]) == 0
    (tmp_path / "torchrun").touch()
    assert installed("torchrun", "torch") == str(tmp_path / "torchrun")
    monkeypatch.setattr(machine, "PORTS", range(1, 2))
    monkeypatch.setattr(machine.socket.socket, "bind", _in_use)
    assert "give launcher.master_port" in refused(capsys, *words)
    assert main([*words, "launcher.master_port=29500"]) == 0


def _in_use(*arguments: object) -> None:
    raise OSError(98, "Address already in use")


@obeys("launch/scripts.py:script_path", "launch/usage.py:require_script")
def test_scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named = scripts.script_path("pretrain_gpt")
    monkeypatch.setattr(scripts, "CODE", tmp_path)
    with pytest.raises(LaunchError, match=r"restore the file, or write it like pretrain_gpt\.py") as error:
        scripts.script_path("pretrain_mine")
    missing = Path(str(error.value).partition(" is missing")[0])
    missing.write_text(named.read_text())
    assert scripts.script_path("pretrain_mine") == missing
    for wrong in ("pretrain_gtp", "x"):
        with pytest.raises(ConfigError, match=r"is not a script; ") as refusal:
            usage.require_script(wrong)
        for script in str(refusal.value).partition("choose one of ")[2].strip("()").split(", "):
            assert usage.require_script(script) == script
