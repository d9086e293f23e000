"""Slurm's commands and their output. Nothing here needs accounting (sacct), which small clusters lack."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.errors import LaunchError

ANSWER_SECONDS = 120.0  # a busy slurmctld may be slow
# sinfo's states of nodes that accept jobs, now or when they are free; a trailing `*` means that a node does not respond
USABLE = frozenset({"idle", "mixed", "allocated", "completing", "planned", "reserved", "allocated+"})
LOST = ("down", "fail")
PENDING_OR_RUNNING = frozenset(
    {"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESIZING",
     "STAGE_OUT", "SIGNALING", "STOPPED"}
)  # fmt: skip


@dataclass(frozen=True)
class SlurmJob:
    number: int
    state: str
    """Slurm's name: PENDING, RUNNING, COMPLETED, ..."""
    reason: str
    """Why it is pending, or how it ended."""
    nodes: str
    """Slurm's short form: n[1-2]."""

    @property
    def is_live(self) -> bool:
        return self.state in PENDING_OR_RUNNING


def answers() -> bool:
    """Whether a cluster responds: installed programs alone do not mean that there is one."""
    return shutil.which("scontrol") is not None and _run("scontrol", "ping").returncode == 0


def submit(script: Path) -> int:
    """Submit a batch script; returns the job ID.

    Raises:
        LaunchError: Slurm refuses it; with Slurm's message.
    """
    answer = _call("sbatch", "--parsable", str(script))
    return int(answer.strip().partition(";")[0])  # JOB_ID or JOB_ID;CLUSTER


def rehearse(text: str) -> str:
    """When and where a batch script would run, in Slurm's words (`sbatch --test-only`).

    Raises:
        LaunchError: it would never run here.
    """
    finished = _run("sbatch", "--test-only", stdin=text)
    words = " ".join(finished.stderr.split()).removeprefix("sbatch: ")
    if finished.returncode:
        raise LaunchError(
            f"slurm would refuse the job ({words}); change launcher.nodes, gpus_per_node, partition or time"
        )
    return words


def jobs(numbers: Sequence[int]) -> list[SlurmJob]:
    """Those of the jobs that Slurm still knows: it forgets a job some minutes after it has ended."""
    if not numbers:
        return []
    finished = _run(
        "squeue", "--noheader", "--states=all", f"--jobs={','.join(map(str, numbers))}", "--format=%A|%T|%r|%N"
    )
    if (
        finished.returncode and "Invalid job id" not in finished.stderr
    ):  # squeue's error for a single job that it has forgotten
        raise _refused("squeue", finished.stderr)
    found = [line.split("|") for line in finished.stdout.splitlines()]
    return [SlurmJob(int(number), state, reason, nodes) for number, state, reason, nodes in found]


def requeue(job: int) -> None:
    _call("scontrol", "requeue", str(job))


def exclude(job: int, nodes: Collection[str]) -> None:
    """Exclude nodes from a pending job; Slurm refuses this for a running job."""
    _call("scontrol", "update", f"jobid={job}", f"ExcNodeList={','.join(nodes)}")


def excluded(job: int) -> list[str]:
    """The nodes excluded from a job."""
    words = _call("scontrol", "-o", "show", "job", str(job)).split()
    names = [word.partition("=")[2] for word in words if word.startswith("ExcNodeList=")]
    return [] if not names or names[-1] == "(null)" else host_names(names[-1])


def cancel(numbers: Sequence[int]) -> None:
    _call("scancel", *map(str, numbers))


def host_names(nodes: str) -> list[str]:
    """`n[1-2]` -> n1, n2."""
    return _call("scontrol", "show", "hostnames", nodes).split()


def node_states(partition: str) -> dict[str, str]:
    """Node -> sinfo's state, such as `idle` or `down*`, for one partition."""
    answer = _call("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N|%T")
    return dict(line.split("|", 1) for line in answer.splitlines())


def is_lost(state: str) -> bool:
    return state.startswith(LOST) or state.endswith("*")


def _call(*argv: str) -> str:
    finished = _run(*argv)
    if finished.returncode:
        raise _refused(argv[0], finished.stderr)
    return finished.stdout


def _refused(program: str, text: str) -> LaunchError:
    return LaunchError(
        f"slurm refuses it ({' '.join(text.split())}); `{program}` gave this answer: correct what it names"
    )


def _run(*argv: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(argv, capture_output=True, text=True, input=stdin, timeout=ANSWER_SECONDS, check=False)
    except FileNotFoundError as error:
        raise LaunchError(
            f"slurm's `{argv[0]}` is not on this machine; log in to the cluster (--dry-run shows the job anywhere)"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"`{argv[0]}` has not answered for {ANSWER_SECONDS:g} s; try again later") from error
