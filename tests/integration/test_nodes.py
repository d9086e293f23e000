"""Two nodes on one machine: all ways to start them give the same results as one node."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.machine import free_port
from megatron_lite.errors import RunEnd
from megatron_lite.observe.metrics import METRICS_FILE
from tests.integration import runs
from tests.integration.runs import TINY, Finished, end_tree, launch, losses, run, run_warm

BOUND_SECONDS = 240.0  # only to fail instead of hanging
HERE = "127.0.0.1"
SHORT = ("train.steps=6", "train.save_interval=0", "train.eval_interval=0", "launcher.device=cpu")


@pytest.fixture(scope="module")
def local_losses(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict]:
    """Losses of a run of a layout on one node."""

    @functools.cache
    def of(layout: str) -> dict:
        run_dir = tmp_path_factory.mktemp("local")
        run_warm([*TINY, *corpus, *SHORT, f"train.run_dir={run_dir}", f"parallel={layout}"]).require_success()
        return losses(run_dir)

    return of


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts commands that are ended at the end of the test, also if it fails."""
    started: list[subprocess.Popen[str]] = []

    def start_one(command: list[str]) -> subprocess.Popen[str]:
        started.append(runs.start(command))
        return started[-1]

    yield start_one
    for process in started:
        if process.poll() is None:
            end_tree(process.pid)
            process.communicate()


def finish(process: subprocess.Popen[str]) -> Finished:
    out, err = process.communicate(timeout=BOUND_SECONDS)
    return Finished(process.returncode, out, err)


@pytest.mark.slow
@pytest.mark.parametrize(("rendezvous", "layout"), [("static", "dp2_tp2"), ("c10d", "tp2")])
def test_torchrun_on_two_nodes(
    rendezvous: str,
    layout: str,
    tiny: Callable[..., list[str]],
    tmp_path: Path,
    local_losses: Callable[[str], dict],
    start: Callable,
) -> None:
    words = tiny(
        "run", *SHORT, f"parallel={layout}", "launcher=torchrun", "launcher.nodes=2", f"launcher.master_address={HERE}",
        f"launcher.rendezvous={rendezvous}", f"launcher.master_port={free_port(HERE)}",
    )  # fmt: skip
    own = [["launcher.node_rank=1"], ["launcher.node_rank=0"]] if rendezvous == "static" else [[], []]
    ends = [finish(node).require_success() for node in [start(launch(*words, *rank)) for rank in own]]
    assert len(local_losses(layout)) == 6
    assert losses(tmp_path / "run") == local_losses(layout), "the nodes changed the curve"
    assert len(list((tmp_path / "run").glob("config-*.yaml"))) == 1, "the nodes came to different configurations"
    assert sum("validation loss" in end.out for end in ends) == 1, "one node has rank 0"
    assert "Traceback" not in "".join(end.err for end in ends)


@pytest.mark.slow
def test_one_node_that_is_asked_to_stop_stops_them_all(
    tiny: Callable[..., list[str]], tmp_path: Path, start: Callable
) -> None:
    words = tiny(
        "run", *SHORT, "train.steps=100000", "parallel=tp2", "launcher=torchrun", "launcher.nodes=2",
        f"launcher.master_address={HERE}", f"launcher.master_port={free_port(HERE)}",
    )  # fmt: skip
    nodes = [start(launch(*words, f"launcher.node_rank={rank}")) for rank in (0, 1)]
    metrics = tmp_path / "run" / METRICS_FILE
    deadline = time.monotonic() + BOUND_SECONDS
    while not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline, "no step was made"
        time.sleep(0.1)
    nodes[1].send_signal(signal.SIGTERM)
    assert [finish(node).code for node in nodes] == [RunEnd.PREEMPTED] * 2
    assert len(list((tmp_path / "run" / "checkpoints").glob("step_*"))) == 1


def _hosts(folder: Path, slots: int) -> list[str]:
    """Overrides for a job on two hosts whose names do not resolve: only ssh would look them up."""
    hostfile = folder / "hosts"
    hostfile.write_text(f"# two machines\nnode-a slots={slots}\nnode-b slots={slots}\n")
    return ["launcher=deepspeed", f"launcher.hostfile={hostfile}", f"launcher.master_address={HERE}",
            f"launcher.master_port={free_port(HERE)}"]  # fmt: skip


@pytest.mark.slow
def test_deepspeed_started_by_hand_on_each_host(
    tiny: Callable[..., list[str]], tmp_path: Path, local_losses: Callable[[str], dict], start: Callable
) -> None:
    words = tiny("run", *SHORT, "parallel=tp2", *_hosts(tmp_path, slots=1))
    for node in [start(launch(*words, f"launcher.node_rank={rank}")) for rank in (0, 1)]:
        finish(node).require_success()
    assert losses(tmp_path / "run") == local_losses("tp2"), "the hosts changed the curve"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not installed")
def test_deepspeed_starts_all_hosts_through_pdsh(
    tiny: Callable[..., list[str]], tmp_path: Path, local_losses: Callable[[str], dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real pdsh, with a script in place of ssh that passes its last arguments to a local shell, like sshd."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(
        "#!/bin/sh\n"
        'while [ "$#" -gt 0 ]; do case "$1" in -o|-p) shift 2;; -*) shift;; *) break;; esac; done\n'
        f'echo "$@" >> {tmp_path}/asked\n'
        "shift\n"
        'exec env -i PATH="$PATH" HOME="$HOME" sh -c "$*"\n'
    )
    ssh.chmod(ssh.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{ssh.parent}{os.pathsep}{os.environ['PATH']}")
    finished = run(launch(*tiny("run", *SHORT, "parallel=dp2_tp2", *_hosts(tmp_path, slots=2)))).require_success()
    ranks = [line for line in (tmp_path / "asked").read_text().splitlines() if "deepspeed.launcher.launch" in line]
    assert sorted(line.split()[0] for line in ranks) == ["node-a", "node-b"]
    assert all("export DS_ACCELERATOR=cpu; export " in line for line in ranks), "the ranks' variables do not reach them"
    assert losses(tmp_path / "run") == local_losses("dp2_tp2"), "the hosts changed the curve"
    assert "validation loss" in finished.out
