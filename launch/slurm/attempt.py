"""What the batch script calls around its srun: `python -m launch.slurm.attempt begin|end RUN_FOLDER ...`.

It imports no torch and needs only the run folder and Slurm's commands. Every decision is a line of the job's log.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

from launch.slurm import records, scheduler
from launch.slurm.verdict import FINAL, Limits, Outcome, decide, suspects, to_exclude
from megatron_lite.errors import EXIT_OK, LaunchError
from megatron_lite.observe.markers import HANG_FILE, Marker, clear_markers, read_marker


def begin(run_dir: Path, job: int) -> int:
    """Make the folder ready for an attempt; anything but 0 means that there is no sense in one."""
    if not any(job in jobs for jobs in records.submissions(run_dir)):  # somebody typed `sbatch job.sh`
        records.record_submission(run_dir, [job])
    code = _end_of_chain(run_dir, job)
    if code != EXIT_OK:
        return code
    clear_markers(run_dir)
    (run_dir / "logs" / "error.txt").unlink(missing_ok=True)
    nodes = scheduler.host_names(os.environ["SLURM_JOB_NODELIST"])
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    records.record_begin(run_dir, job=job, restart=restart, nodes=nodes)
    _say(job, f"attempt {restart + 1} on {', '.join(nodes)}; newest checkpoint: {_step(run_dir)}")
    return EXIT_OK


def _end_of_chain(run_dir: Path, job: int) -> int:
    """The exit code of an earlier link that ended for good; 0 = there is none."""
    ends, marker = records.attempts(run_dir, "end"), read_marker(run_dir)
    if not ends or marker is None or marker.end not in FINAL:
        return EXIT_OK
    earlier = ends[-1]["job"]
    if earlier == job or not any({earlier, job} <= set(jobs) for jobs in records.submissions(run_dir)):
        return EXIT_OK
    _say(job, f"not started: job {earlier} of this chain ended with {marker.end.name}: {marker.message}")
    return int(marker.end)


def end(run_dir: Path, job: int, code: int, terminated: bool, limits: Limits) -> int:
    """Decide what follows an attempt, say it and do it; returns the job's exit code."""
    marker = read_marker(run_dir)
    begun = records.attempts(run_dir, "begin", job)[-1]
    checkpoint = records.newest_checkpoint(run_dir)
    advanced = checkpoint not in (None, begun["checkpoint"])  # an older one is what a rollback leaves
    earlier = [entry for entry in records.attempts(run_dir, "end", job) if entry["requeued"]]
    outcome = Outcome(
        marker=marker,
        code=code,
        terminated=terminated,
        requeues=len(earlier),
        stalled=_stalled([entry["advanced"] for entry in earlier]),
        advanced=advanced,
    )
    verdict = decide(outcome, limits)
    records.record_end(
        run_dir,
        job=job,
        end=None if marker is None else marker.end.name,
        requeued=verdict.requeue,
        advanced=advanced,
        reason=verdict.reason,
    )
    _say(job, f"{verdict.reason}; newest checkpoint: {_step(run_dir)}")
    _show_error(run_dir)
    if verdict.requeue:
        excluded = _nodes_to_exclude(run_dir, job, marker, begun["nodes"])
        # From here on Slurm ends the batch script and all in it, with SIGTERM, and with SIGKILL after KillWait (30 s by
        # default). In between it takes the nodes to exclude, which it refuses while the job runs.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        scheduler.requeue(job)
        _exclude(job, excluded)
    elif terminated:
        with contextlib.suppress(LaunchError):  # it was cancelled, not requeued by Slurm because a node was lost
            _exclude(job, _nodes_to_exclude(run_dir, job, None, begun["nodes"]))
    return verdict.exit_code


def _stalled(advanced: list[bool]) -> int:
    """How many at the end of the list did not advance."""
    return next((count for count, one in enumerate(reversed(advanced)) if one), len(advanced))


def _nodes_to_exclude(run_dir: Path, job: int, marker: Marker | None, nodes: list[str]) -> list[str]:
    """Those that the next attempt must not get; says so where none can be spared."""
    states = scheduler.node_states(os.environ["SLURM_JOB_PARTITION"])
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
        return json.loads((run_dir / HANG_FILE).read_text())["node"]
    except (OSError, ValueError):  # there is no such report, or it was cut short
        return None


def _show_error(run_dir: Path) -> None:
    """The message of a user's error, which the ranks leave once for all of them."""
    error_file = run_dir / "logs" / "error.txt"
    if error_file.exists():
        print(error_file.read_text().rstrip(), flush=True)


def _step(run_dir: Path) -> str:
    step = records.newest_checkpoint(run_dir)
    return "none" if step is None else f"step {step}"


def _say(job: int, text: str) -> None:
    print(f"job {job}: {text}", flush=True)


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
    job = int(os.environ["SLURM_JOB_ID"])
    try:
        if words.command == "begin":
            return begin(words.run_dir, job)
        limits = Limits(requeues=words.max_requeues, stalled=words.max_stalled)
        return end(words.run_dir, job, words.code, bool(words.terminated), limits)
    except LaunchError as error:
        _say(job, f"error: {error}; `python -m launch requeue {words.run_dir}` submits it again")
        return int(error.end)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
