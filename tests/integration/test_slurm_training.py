"""Real training on a real Slurm with all kinds of interruptions: the loss curve equals that of an undisturbed run.

One local run is the reference. All jobs are submitted at once, and each waits at a known step for its interruption. All
are interrupted before the first result is checked, so that their waiting times overlap.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.cli import main
from launch.slurm import records
from megatron_lite.errors import RunEnd
from megatron_lite.observe.markers import read_marker
from megatron_lite.observe.wandb_record import history
from megatron_lite.observe.wandb_tracker import run_id
from tests.integration.runs import FAULTS, REPOSITORY, TINY, losses, run_warm
from tests.integration.slurm_cluster import Cluster

STEPS = 24
DISTURBED_STEP = 13
SETTINGS = (
    *TINY,
    "parallel=dp2",
    f"train.steps={STEPS}",
    "train.save_interval=5",
    "model.hidden_dropout=0.1",
    "tracking.wandb=offline",
)
TWO_NODES = ("launcher.nodes=2",)
JOBS: dict[str, tuple[str, tuple[str, ...]]] = {  # name -> how rank 1 waits for the disturbance, settings
    "node lost": ("hold", (*TWO_NODES, "launcher.partition=fragile", "launcher.grace_seconds=1")),
    "preempted": ("pause", ("launcher.partition=low", "launcher.sbatch_options=[--exclusive]")),
    "cancelled": ("pause", TWO_NODES),
    "time limit": ("pause", TWO_NODES),
}
MINUTES_OF_WARNING = 3  # launcher.grace_seconds and 30 s to conclude; Slurm rounds in favour of the job
WAIT_SECONDS = 300.0
pytestmark = pytest.mark.slow


@dataclass
class Trained:
    """A run folder whose job has been submitted."""

    run_dir: Path
    cluster: Cluster

    @property
    def job(self) -> int:
        """The newest job."""
        return records.submissions(self.run_dir)[-1][-1]

    @property
    def nodes(self) -> list[list[str]]:
        """The nodes of each attempt."""
        return [entry.nodes for entry in records.attempts(self.run_dir, "begin")]

    def wait_for(self, is_so: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while not is_so():
            log = "".join(path.read_text() for path in sorted((self.run_dir / "logs").glob("slurm-*.out")))
            assert time.monotonic() < deadline, f"{what} has not come\n{self.cluster.job(self.job)}\n{log}"
            time.sleep(0.2)

    def wait_for_pause(self) -> None:
        self.wait_for(lambda: (self.run_dir / "paused").exists(), f"step {DISTURBED_STEP}")

    def limit_time(self, minutes: float) -> None:
        """Set the time limit of the running attempt, counted from its start; math.inf = no limit."""
        limit = "UNLIMITED" if math.isinf(minutes) else f"{minutes:g}"
        self.cluster.call("scontrol", "update", f"jobid={self.job}", f"timelimit={limit}")

    def set_node(self, node: str, *words: str) -> None:
        self.cluster.call("scontrol", "update", f"nodename={node}", *words)

    def minutes(self) -> int:
        """Full minutes that this attempt has run."""
        hours, minutes, _ = self.cluster.job(self.job)["RunTime"].split(":")
        return int(hours) * 60 + int(minutes)

    def wait_for_end(self, state: str = "COMPLETED") -> None:
        self.wait_for(lambda: self.cluster.job(self.job)["JobState"] == state, state)


@pytest.fixture(scope="module")
def reference(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same training, run locally without interruptions."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    run_warm([*SETTINGS, *corpus, f"train.run_dir={folder}"]).require_success()
    return folder


@pytest.fixture(scope="module")
def trained(
    slurm: Cluster, corpus: list[str], reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Trained]]:
    """The interrupted jobs. `reference` comes first because it prepares the data."""
    folder = tmp_path_factory.mktemp("jobs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        jobs = {name: _submit(slurm, folder / name, corpus, *job) for name, job in JOBS.items()}
        for name, found in jobs.items():
            found.wait_for_pause()
            DISTURBANCES[name](found)
        yield jobs


def _submit(cluster: Cluster, run_dir: Path, corpus: list[str], fault: str, words: tuple[str, ...]) -> Trained:
    environment = {
        "FAULT": f"{fault} 1 {DISTURBED_STEP}",
        "FAULT_DIR": str(run_dir),
        "PYTHONPATH": f"{FAULTS}:{REPOSITORY}",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    variables = [f'launcher.environment.{name}="{value}"' for name, value in environment.items()]
    place = [f"train.run_dir={run_dir}", "launcher=slurm", "launcher.master_address=127.0.0.1"]
    quoted = [word.replace(f"={run_dir}", f"='{run_dir}'") for word in place]
    assert main(["pretrain_gpt", *SETTINGS, *corpus, *quoted, *variables, *words]) == 0
    return Trained(run_dir, cluster)


def _require_undisturbed(found: Trained, reference: Path) -> None:
    """The loss curve is bitwise the same; wandb has a single run with each step once."""
    marker = read_marker(found.run_dir)
    assert marker is not None
    assert (marker.end, marker.step) == (RunEnd.DONE, STEPS)
    assert losses(found.run_dir) == losses(reference)
    assert len(losses(reference)) == STEPS
    rows = list(history(found.run_dir, run_id(found.run_dir)))
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, STEPS + 1))
    assert [row["train/loss"] for row in rows if "train/loss" in row] == [
        loss for loss, _ in losses(reference).values()
    ]
    folders = {path.name.rpartition("-")[2] for path in (found.run_dir / "wandb").glob("offline-run-*")}
    assert folders == {run_id(found.run_dir)}


def _lose_a_node(found: Trained) -> None:
    found.set_node(found.nodes[0][1], "state=down", "reason=test")


def _preempt(found: Trained) -> None:
    """Preempt the job by one of higher priority."""
    other = found.run_dir.with_name("higher")
    other.mkdir()
    script = other / "job.sh"
    script.write_text("#!/bin/sh\nsleep 1\n")
    found.cluster.call("sbatch", "--partition=high", "--exclusive", f"--output={other}/out", str(script))


def _cancel(found: Trained) -> None:
    found.cluster.call("scancel", str(found.job))


def _limit_time(found: Trained) -> None:
    """Set the limit after the job has paused: a limit from the start could end it during imports on a slow machine."""
    found.limit_time(found.minutes() + MINUTES_OF_WARNING)
    found.wait_for(lambda: bool(records.attempts(found.run_dir, "end")), "the warning")
    found.limit_time(math.inf)


DISTURBANCES: dict[str, Callable[[Trained], None]] = {
    "node lost": _lose_a_node,
    "preempted": _preempt,
    "cancelled": _cancel,
    "time limit": _limit_time,
}


def test_cancelled_and_requeued(trained: dict[str, Trained], reference: Path) -> None:
    found = trained["cancelled"]
    cancelled = found.job
    found.wait_for_end("CANCELLED")
    assert records.attempts(found.run_dir, "end"), "Slurm has ended the batch script before it could decide"
    assert len(found.nodes[0]) == 2, "a job of two nodes"
    assert main(["requeue", str(found.run_dir)]) == 0
    assert found.job != cancelled
    found.wait_for_end()
    _require_undisturbed(found, reference)


def test_node_lost(trained: dict[str, Trained], reference: Path) -> None:
    """No save is possible, so the steps since the last checkpoint are trained again."""
    found = trained["node lost"]
    lost = found.nodes[0][1]
    try:
        found.wait_for_end()
    finally:
        found.set_node(lost, "state=resume")
    assert lost not in found.nodes[1]
    assert records.attempts(found.run_dir, "begin")[1].checkpoint == 10
    _require_undisturbed(found, reference)


def test_preempted_by_a_job_of_higher_priority(trained: dict[str, Trained], reference: Path) -> None:
    found = trained["preempted"]
    found.wait_for_end()
    assert found.cluster.job(found.job)["Restarts"] == "1"
    _require_undisturbed(found, reference)


def test_time_limit(trained: dict[str, Trained], reference: Path) -> None:
    found = trained["time limit"]
    found.wait_for_end()
    assert int(found.cluster.job(found.job)["Restarts"]) >= 1
    _require_undisturbed(found, reference)
