"""Called by the batch script before and after srun: `python -m launch.slurm.attempt begin|end RUN_FOLDER ...`.

It imports no torch and needs only the run folder and Slurm's commands. Every decision is a line in the job's log.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from launch.environment import is_count
from launch.slurm import records, scheduler
from launch.slurm.verdict import FINAL, NOTHING_LEFT, AttemptOutcome, RequeueLimits, decide, suspects, to_exclude
from megatron_lite.errors import EXIT_OK, DamagedFileError, LaunchError, RunEnd
from megatron_lite.files import remove_file
from megatron_lite.observe.console import forgive_output
from megatron_lite.observe.markers import HANG_FILE, Marker, clear_markers, read_marker
from megatron_lite.observe.run_lock import Role, holder_of, own_attempt, take
from megatron_lite.state_files import read_object, read_text, warn


@dataclass(frozen=True)
class HangReport:
    """The fields of hang.json that a job needs."""

    node: str | None = None


def begin(run_dir: Path, job: int) -> int:
    """Prepare the folder for an attempt; a nonzero result means that there should be no attempt.

    Raises:
        LaunchError: another process uses the folder, or Slurm does not respond.
    """
    if not any(job in jobs for jobs in records.submissions(run_dir)):  # the user typed `sbatch job.sh`
        records.record_submission(run_dir, [job])
    code = _earlier_end(run_dir, job)
    if code != EXIT_OK:
        return code
    _clear(run_dir, job)
    nodes, restart = _nodes_of_job(), _restarts()
    records.record_begin(run_dir, job=job, restart=restart, nodes=nodes)
    _say(job, f"attempt {restart + 1} on {', '.join(nodes)}; newest checkpoint: {_step(run_dir)}")
    return EXIT_OK


def _clear(run_dir: Path, job: int) -> None:
    """Remove the markers of earlier attempts. The ranks take the lock themselves when they start.

    Write errors give only a warning: ranks that cannot write will report it, and the job is requeued.
    """
    try:
        lock = take(run_dir, Role.command, own_attempt(), report=lambda line: _say(job, line))
        try:
            clear_markers(run_dir)
            remove_file(run_dir / "logs" / "error.txt")
        finally:
            lock.release()
    except OSError as error:
        warn(f"{run_dir} cannot be made ready ({error}); the ranks are started all the same")


def _earlier_end(run_dir: Path, job: int) -> int:
    """The exit code if the run is done, or an earlier job of the chain ended for good; 0 = neither."""
    ends, marker = records.attempts(run_dir, records.END), read_marker(run_dir)
    if marker is not None and marker.end is RunEnd.DONE:
        _say(job, "the run is done, nothing is left to do")
        return NOTHING_LEFT
    if not ends or marker is None or marker.end not in FINAL:
        return EXIT_OK
    earlier = ends[-1].job
    if earlier == job or not any({earlier, job} <= set(jobs) for jobs in records.submissions(run_dir)):
        return EXIT_OK
    _say(job, f"not started: job {earlier} of this chain ended with {marker.end.name}: {marker.message}")
    return int(marker.end)


def end(run_dir: Path, job: int, code: int, terminated: bool, limits: RequeueLimits) -> int:
    """Decide what follows an attempt, log it and do it; returns the job's exit code."""
    marker = read_marker(run_dir)
    begins, nodes = records.attempts(run_dir, records.BEGIN, job), _nodes_of_job()
    earlier = [entry for entry in records.attempts(run_dir, records.END, job) if entry.requeued]
    outcome = AttemptOutcome(
        marker=marker,
        code=code,
        terminated=terminated,
        requeues=len(earlier) + max(_restarts() + 1 - len(begins), 0),
        stalled=_stalled([entry.advanced for entry in earlier]),
        advanced=_has_advanced(run_dir, begins[-1] if begins else None),
        used_by=_other_user(run_dir, job),
    )
    verdict = decide(outcome, limits)
    records.record_end(
        run_dir,
        job=job,
        end=None if marker is None else marker.end.name,
        requeued=verdict.requeue,
        advanced=outcome.advanced,
        reason=verdict.reason,
    )
    _say(job, f"{verdict.reason}; newest checkpoint: {_step(run_dir)}")
    _show_error(run_dir)
    if verdict.requeue:
        excluded = _nodes_to_exclude(run_dir, job, marker, nodes)
        # From here on Slurm ends the batch script and all its processes: SIGTERM, then SIGKILL after KillWait (30 s by
        # default). In between it accepts nodes to exclude, which it refuses while the job runs.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        scheduler.requeue(job)
        _exclude(job, excluded)
    elif terminated:
        with contextlib.suppress(LaunchError):  # the job was cancelled, not requeued by Slurm after losing a node
            _exclude(job, _nodes_to_exclude(run_dir, job, None, nodes))
    return verdict.exit_code


def _has_advanced(run_dir: Path, begun: records.JobAttempt | None) -> bool:
    """Whether the newest checkpoint differs from the one at the start; after a rollback it may be an older one.

    If the record of the start is lost, the latest earlier record is used.
    """
    before = [*records.attempts(run_dir, records.END), *([begun] if begun else [])]
    known = before[-1].checkpoint if before else None
    return records.newest_checkpoint(run_dir) not in (None, known)


def _other_user(run_dir: Path, job: int) -> str | None:
    """The other holder of the run folder, which refused our ranks or took it over from them."""
    holder = holder_of(run_dir)
    return None if holder is None or holder.job == job else str(holder)


def _restarts() -> int:
    """How often Slurm has restarted this job."""
    count = os.environ.get("SLURM_RESTART_COUNT", "0")
    return int(count) if is_count(count) else 0


def _of_job(name: str) -> str:
    """A variable that Slurm sets in every batch job.

    Raises:
        LaunchError: it is not set.
    """
    if not os.environ.get(name):
        raise LaunchError(f"{name} is not set, as Slurm does within a job")
    return os.environ[name]


def _job_number() -> int:
    number = _of_job("SLURM_JOB_ID")
    if not is_count(number):
        raise LaunchError(f"SLURM_JOB_ID={number} is not a number, as Slurm gives every job")
    return int(number)


def _nodes_of_job() -> list[str]:
    return scheduler.host_names(_of_job("SLURM_JOB_NODELIST"))


def _stalled(advanced: list[bool]) -> int:
    """How many entries at the end of the list did not advance."""
    return next((count for count, one in enumerate(reversed(advanced)) if one), len(advanced))


def _nodes_to_exclude(run_dir: Path, job: int, marker: Marker | None, nodes: list[str]) -> list[str]:
    """Nodes that the next attempt should avoid; logs it if none can be spared."""
    states = scheduler.node_states(_of_job("SLURM_JOB_PARTITION"))
    lost = [node for node in nodes if scheduler.is_lost(states.get(node, ""))]
    usable = [node for node, state in states.items() if state in scheduler.USABLE]
    suspected = suspects(marker, _reported_node(run_dir), lost, nodes)
    excluded, remark = to_exclude(suspected, scheduler.excluded(job), usable, len(nodes))
    if remark:
        _say(job, remark)
    return excluded


def _exclude(job: int, nodes: list[str]) -> None:
    if nodes:
        scheduler.exclude(job, nodes)
        _say(job, f"the next attempt will do without {', '.join(nodes)}")


def _reported_node(run_dir: Path) -> str | None:
    try:
        report = read_object(run_dir / HANG_FILE, HangReport)
    except DamagedFileError as error:
        warn(f"{error}; no node is excluded for it")
        return None
    return None if report is None else report.node


def _show_error(run_dir: Path) -> None:
    """Show the message of a user error, which the ranks leave once for all of them."""
    with contextlib.suppress(DamagedFileError):  # then there is no message to show
        if text := read_text(run_dir / "logs" / "error.txt"):
            print(text.rstrip(), flush=True)


def _step(run_dir: Path) -> str:
    step = records.newest_checkpoint(run_dir)
    return "none" if step is None else f"step {step}"


def _say(job: int | None, text: str) -> None:
    print(text if job is None else f"job {job}: {text}", flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.slurm.attempt")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("begin").add_argument("run_dir", type=Path)
    ending = commands.add_parser("end")
    ending.add_argument("run_dir", type=Path)
    ending.add_argument("code", type=int, help="exit code of srun")
    ending.add_argument("terminated", type=int, choices=(0, 1), help="whether the batch script was sent SIGTERM")
    ending.add_argument("--max-requeues", type=int, required=True)
    ending.add_argument("--max-stalled", type=int, required=True)
    words = parser.parse_args(argv)
    job: int | None = None
    try:
        job = _job_number()
        if words.command == "begin":
            return begin(words.run_dir, job)
        limits = RequeueLimits(requeues=words.max_requeues, stalled=words.max_stalled)
        return end(words.run_dir, job, words.code, bool(words.terminated), limits)
    except LaunchError as error:
        _say(job, f"error: {error}; `python -m launch requeue {words.run_dir}` submits it again")
        return int(error.end)


if __name__ == "__main__":
    forgive_output()
    sys.exit(main(sys.argv[1:]))
