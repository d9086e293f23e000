"""`python -m launch status|logs|cancel|requeue RUN_FOLDER`: the state of a run, here or on a cluster."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch.messages import tail
from launch.slurm import records, scheduler
from launch.slurm.launcher import live_jobs, submit
from megatron_lite.config.frozen import load_frozen
from megatron_lite.config.keys import shown
from megatron_lite.errors import EXIT_OK, ConfigError, DamagedFileError, LaunchError, RunEnd
from megatron_lite.files import modified_ns
from megatron_lite.observe.markers import ask_to_stop, read_marker
from megatron_lite.observe.metrics import METRICS_FILE
from megatron_lite.observe.run_lock import Holder, holder_of
from megatron_lite.state_files import decode, warn

FOLLOW_FLAG = "--follow"
POLL_SECONDS = 1.0
IN_WORDS = {
    RunEnd.DONE: "done",
    RunEnd.FAILED: "failed",
    RunEnd.CONFIG_ERROR: "ended by an error that a setting, a file or the machine has to fix",
    RunEnd.PREEMPTED: "asked to stop; it has saved and can go on",
    RunEnd.DIVERGED: "diverged",
    RunEnd.OUT_OF_DATA: "out of data",
    RunEnd.OUT_OF_MEMORY: "out of memory",
    RunEnd.HUNG: "hung",
    RunEnd.DISK_ERROR: "ended by a disk that is full or fails",
    RunEnd.DEVICE_ERROR: "ended by a GPU, its driver or its link, which failed",
}


def main(argv: list[str]) -> int:
    """One of COMMANDS and its arguments; returns the exit code.

    Raises:
        ConfigError: no run folder, or an invalid argument.
        LaunchError: there is nothing to cancel or to requeue, or Slurm is not available.
    """
    command, words = argv[0], argv[1:]
    flags = [word for word in words if word.startswith("-")]
    folders = [word for word in words if not word.startswith("-")]
    if command != "logs" and FOLLOW_FLAG in flags:
        raise ConfigError(f"{FOLLOW_FLAG} belongs to `python -m launch logs`; leave it out")
    unknown = [flag for flag in flags if flag not in (FOLLOW_FLAG, "--debug")]
    if unknown:
        raise ConfigError(f"{unknown[0]} is not an option of `python -m launch {command}`; leave it out")
    if len(folders) != 1:
        raise ConfigError(f"`python -m launch {command}` needs one run folder, not {len(folders)}; write runs/NAME")
    run_dir = run_folder(folders[0])
    if FOLLOW_FLAG in flags:
        return follow_logs(run_dir)
    return COMMANDS[command](run_dir)


def run_folder(word: str) -> Path:
    """The run folder that the user named.

    Raises:
        ConfigError: it does not exist.
    """
    path = Path(word)
    if not os.path.isdir(path):  # unlike Path.is_dir, returns False for a name that is too long
        raise ConfigError(f"{shown(word)} is not a folder; give the run folder that the launcher has named")
    if not any(path.glob("config-*.yaml")):
        raise ConfigError(f"{word} holds no run: there is no config-*.yaml in it; give a run folder")
    return path.absolute()


def status(run_dir: Path) -> int:
    for name, text in _status(run_dir):
        print(f"{name:<12}{text}")
    return EXIT_OK


def _status(run_dir: Path) -> Iterator[tuple[str, str]]:
    yield "run folder", str(run_dir)
    holder = holder_of(run_dir)
    jobs = _known_jobs(run_dir)
    yield "state", _state(run_dir, holder, jobs)
    yield "progress", _progress(run_dir)
    if holder is not None:
        yield "process", str(holder).removeprefix("process ")
    if jobs is None:
        yield "jobs", "no slurm answers on this machine"
    for job in jobs or []:
        restarts = max((entry.restart for entry in records.attempts(run_dir, records.BEGIN, job.number)), default=0)
        where = f"on {job.nodes}" if job.nodes else f"({job.reason})"
        yield "job", f"{job.number}: {job.state} {where}; restarts: {restarts}"
    ends = records.attempts(run_dir, records.END)
    if ends:
        yield "last end", f"job {ends[-1].job}: {ends[-1].reason}"
    step = records.newest_checkpoint(run_dir)
    yield "checkpoint", "none" if step is None else f"step {step}"


def state(run_dir: Path) -> str:
    """What the run is doing, or how its latest attempt ended."""
    return _state(run_dir, holder_of(run_dir), _known_jobs(run_dir))


def _state(run_dir: Path, holder: Holder | None, jobs: list[scheduler.SlurmJob] | None) -> str:
    running = holder is not None or any(job.state == "RUNNING" for job in jobs or [])
    return "running" if running else _end_in_words(run_dir)


def _known_jobs(run_dir: Path) -> list[scheduler.SlurmJob] | None:
    """Slurm's jobs of the latest submission; None = Slurm cannot be asked here."""
    submissions = records.submissions(run_dir)
    if not submissions:
        return []
    return scheduler.jobs(submissions[-1]) if scheduler.answers() else None


def _end_in_words(run_dir: Path) -> str:
    marker = read_marker(run_dir)
    if marker is None:
        return "not running; no attempt has left word of its end"
    step = "" if marker.step is None else f" at step {marker.step}"
    message = " ".join(marker.message.split())
    return f"{marker.end.name}{step}: {IN_WORDS[marker.end]}" + (f" ({message})" if message else "")


def _progress(run_dir: Path) -> str:
    last, steps = _last_figures(run_dir), _train_steps(run_dir)
    if last is None:
        return f"step 0 of {steps}"
    text = f"step {last.step} of {steps}"
    text += "" if last.loss is None else f", loss {float(last.loss):.4g}"
    return text + ("" if last.tokens_per_second is None else f", {last.tokens_per_second:,.0f} tokens/s")


def _train_steps(run_dir: Path) -> str:
    frozen = max(run_dir.glob("config-*.yaml"), key=modified_ns)
    try:
        return str(load_frozen(frozen).train.steps)
    except ConfigError as error:
        warn(error)
        return "unknown"


@dataclass(frozen=True)
class _Figures:
    """The metrics in a line of metrics.jsonl that a status shows."""

    step: int
    loss: float | Literal["NaN", "Infinity", "-Infinity"] | None = None
    tokens_per_second: float | None = None


def _last_figures(run_dir: Path) -> _Figures | None:
    """Metrics of the last complete line of metrics.jsonl."""
    for line in reversed(tail(run_dir / METRICS_FILE, lines=2)):  # the very last line may be incomplete
        with suppress(DamagedFileError):
            return decode(line, _Figures, METRICS_FILE)
    return None


def logs(run_dir: Path) -> int:
    paths = [path for path in (_job_log(run_dir), _telling_rank_log(run_dir)) if path is not None]
    if not paths:
        raise LaunchError(f"{run_dir} has no logs: no rank has started yet; see {_command('status', run_dir)}")
    for path in paths:
        print(f"== {path}")
        print("\n".join(tail(path, lines=40)))
    return EXIT_OK


def _job_log(run_dir: Path) -> Path | None:
    """The log of the newest job that has started."""
    found = (run_dir / "logs").glob("slurm-*.out")
    return max(found, key=modified_ns, default=None)


def _telling_rank_log(run_dir: Path) -> Path | None:
    """The log of the rank that the marker names, or else of rank 0."""
    marker = read_marker(run_dir)
    named = re.search(r"\brank (\d+)", marker.message) if marker is not None else None
    path = run_dir / "logs" / f"rank-{named[1] if named else 0}.log"
    return path if path.exists() else None


def follow_logs(run_dir: Path) -> int:
    """Print the output of the job and of those after it, until none is pending or running; Ctrl-C ends it sooner."""
    path, position = None, 0
    while True:
        alive = holder_of(run_dir) is not None or bool(live_jobs(run_dir))
        newest = _job_log(run_dir) or _telling_rank_log(run_dir)
        if newest is not None:
            path, position = newest, position if newest == path else 0
            position += _print_from(path, position)
        if not alive:
            return EXIT_OK
        time.sleep(POLL_SECONDS)


def _print_from(path: Path, position: int) -> int:
    """Print the content of a file from this byte on; returns the file's length in bytes."""
    try:
        if not path.is_file():
            return 0
        with path.open("rb") as file:
            file.seek(position)
            new = file.read()
    except OSError as error:
        warn(f"{path} cannot be read: {error.strerror}")
        return 0
    sys.stdout.write(new.decode(errors="replace"))
    sys.stdout.flush()
    return len(new)


def cancel(run_dir: Path) -> int:
    jobs = [job.number for job in live_jobs(run_dir)]
    if jobs:
        scheduler.cancel(jobs)
        print(f"cancelled job {', '.join(map(str, jobs))}; {_how_to_go_on(run_dir)}")
        return EXIT_OK
    holder = holder_of(run_dir)
    if holder is None:
        raise LaunchError(
            f"nothing of {run_dir} waits or runs, so there is nothing to cancel; see {_command('status', run_dir)}"
        )
    ask_to_stop(run_dir, "`python -m launch cancel`")
    print(f"asked {holder} and its ranks to save and to stop")
    return EXIT_OK


def _how_to_go_on(run_dir: Path) -> str:
    return f"{_command('requeue', run_dir)} goes on with the run"


def _command(name: str, run_dir: Path) -> str:
    """What to type."""
    return f"`python -m launch {name} {shlex.quote(str(run_dir))}`"


def requeue(run_dir: Path) -> int:
    if not (run_dir / records.SCRIPT_FILE).exists():
        raise LaunchError(
            f"{run_dir} has no {records.SCRIPT_FILE}: launcher=slurm has not submitted it; start it as before, and it "
            "goes on from its newest checkpoint"
        )
    marker = read_marker(run_dir)
    if marker is not None and marker.end is RunEnd.DONE:
        raise LaunchError(f"{run_dir} is done at step {marker.step}; to go on, submit it with more train.steps")
    jobs = live_jobs(run_dir)
    running = [job.number for job in jobs if job.state == "RUNNING"]
    if running:
        scheduler.requeue(running[0])
        print(f"job {running[0]} goes back into the queue, and on from its newest checkpoint")
    elif jobs:
        raise LaunchError(
            f"job {jobs[0].number} of {run_dir} is {jobs[0].state} already; wait for it, or end it with "
            f"{_command('cancel', run_dir)}"
        )
    elif (holder := holder_of(run_dir)) is not None:
        raise LaunchError(f"{run_dir} is in use by {holder}; wait for it, or end it with {_command('cancel', run_dir)}")
    else:
        submit(run_dir, links=1)
    return EXIT_OK


COMMANDS: dict[str, Callable[[Path], int]] = {"status": status, "logs": logs, "cancel": cancel, "requeue": requeue}
