"""Start real runs by the commands that users run, on a corpus that is prepared once per session."""

from __future__ import annotations

import contextlib
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from launch.cli import main
from megatron_lite.observe.metrics import METRICS_FILE, read_metrics
from tests.distributed.harness import fork_server

REPOSITORY = Path(__file__).parents[2]
TINY = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "data.seq_length=32",
    "data.tokenizer_vocab_size=512",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "train.steps=12",
    "train.eval_interval=6",
    "train.eval_batches=1",
    "train.save_interval=4",
    "train.generate_tokens=4",
    "optimizer.warmup_steps=2",
    "tracking.plot=false",
)


@dataclass(frozen=True)
class Finished:
    """A finished process of a run."""

    code: int
    out: str
    err: str

    def require_success(self) -> Finished:
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self


FAULTS = REPOSITORY / "tests" / "integration" / "faults"


def environment(fault: str = "") -> dict[str, str]:
    """Environment of a run's process; `fault`: see faults/sitecustomize.py."""
    planted = {"FAULT": fault, "PYTHONPATH": f"{FAULTS}{os.pathsep}{REPOSITORY}"} if fault else {}
    return {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        **planted,
    }


def run(
    command: Sequence[str], *, timeout_seconds: float = 240.0, cwd: Path | None = None, fault: str = ""
) -> Finished:
    """Run a command until it ends; after the timeout it is killed together with its children."""
    process = start(command, cwd=cwd, fault=fault)
    try:
        out, err = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        end_tree(process.pid)
        out, err = process.communicate()
        raise AssertionError(f"{' '.join(command)} did not end in {timeout_seconds} s\n{out}\n{err}") from None
    return Finished(process.returncode, out, err)


def run_warm(
    words: Sequence[str],
    *,
    script: str = "pretrain_gpt",
    timeout_seconds: float = 240.0,
    planted: Mapping[str, str] | None = None,
) -> Finished:
    """Like `python -m launch`, but in a fork of a server that has already imported everything (2/3 of the CPU time).

    For tests of results and files of a run; tests of commands, processes and signals use `run(launch(...))`.

    Args:
        planted: variables of faults/sitecustomize.py.
    """
    with tempfile.TemporaryDirectory(prefix="warm-") as name:
        folder = Path(name)
        process = fork_server().Process(target=_launch_here, args=([script, *words], folder, planted or {}))
        process.start()
        process.join(timeout_seconds)
        code = process.exitcode
        if code is None:
            end_tree(process.pid)
            process.join()
        out, err = ((folder / stream).read_text() for stream in ("out", "err"))
    assert code is not None, f"{' '.join(words)} did not end in {timeout_seconds} s\n{out}\n{err}"
    return Finished(code, out, err)


def _launch_here(argv: list[str], folder: Path, planted: Mapping[str, str]) -> None:
    """Launch like a separate process would: with its own output, environment and session."""
    for descriptor, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / stream, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.update(environment() | planted)
    os.chdir(REPOSITORY)
    os.setsid()
    if planted:
        runpy.run_path(str(FAULTS / "sitecustomize.py"))
    sys.exit(main(argv))


def end_tree(pid: int) -> None:
    """SIGKILL a process and all its descendants, including torchrun's ranks, which are in their own sessions."""
    parent = psutil.Process(pid)
    for process in [*parent.children(recursive=True), parent]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def start(command: Sequence[str], cwd: Path | None = None, fault: str = "") -> subprocess.Popen[str]:
    """Start a command in its own session, so that it can be killed together with its ranks."""
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(fault),
        cwd=cwd or REPOSITORY,
        start_new_session=True,
    )


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """Wait until the running command has logged this step."""
    deadline = time.monotonic() + 200
    while len(losses(run_dir)) < step:
        assert process.poll() is None, f"ended before step {step}: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def launch(*words: str, script: str = "pretrain_gpt") -> list[str]:
    return [sys.executable, "-m", "launch", script, *words]


def losses(run_dir: Path) -> dict[int, Any]:
    """The exact loss and gradient norm of every step."""
    return {entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in read_metrics(run_dir / METRICS_FILE)}
