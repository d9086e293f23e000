"""`launcher=slurm`: runs as a batch job, whose script is written into the run folder and submitted."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from launch.base import LaunchPlan
from launch.environment import ERROR_FILE, passed_environment, rank_environment
from launch.preparation import run_folder
from launch.scripts import is_installed, script_path
from launch.slurm import records, scheduler
from launch.slurm.script import batch_script
from megatron_lite.config import frozen
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.errors import EXIT_OK, LaunchError, RunEnd
from megatron_lite.observe.markers import read_marker

SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds between torchrun's SIGTERM and SIGKILL to its ranks; default 30


class SlurmLauncher:
    """Submits a run as one job or as a chain of jobs, and does not wait for it.

    Args:
        torchrun: the program that starts the ranks of one node; None = torch's own.
    """

    def __init__(self, torchrun: Sequence[str] | None = None) -> None:
        self._torchrun = torchrun

    def plan(self, config: ResolvedConfig) -> LaunchPlan:
        run_dir = config.run_dir.absolute()  # the job may be submitted again from any folder
        passed_environment(config)  # check that the variables exist: sbatch passes them on
        config_file = frozen.frozen_path(config, run_dir)
        environment = {
            **rank_environment(config, one_machine=config.launcher.nodes == 1),
            ERROR_FILE: str(run_dir / "logs" / "error.txt"),
            SHUTDOWN: str(math.ceil(config.launcher.grace_seconds)),
            **config.launcher.environment,
        }
        rank_argv = [*_entry(config), "--config", str(config_file)]
        job_script = run_dir / records.SCRIPT_FILE
        text = batch_script(config, run_dir, environment, rank_argv, self._torchrun)
        return LaunchPlan(
            config=config,
            run_dir=run_dir,
            files={config_file: frozen.render(config), job_script: text},
            argv=("sbatch", "--parsable", str(job_script)),
            env=environment,
            batch_script=job_script,
        )

    def run(self, plan: LaunchPlan) -> int:
        marker, steps = read_marker(plan.run_dir), plan.config.train.steps
        if marker is not None and marker.end is RunEnd.DONE and marker.step is not None and marker.step >= steps:
            print(f"the run is done: it has reached train.steps={steps}, and nothing is submitted")
            return EXIT_OK
        refuse_second_job(plan.run_dir)
        with run_folder(plan):
            submit(plan.run_dir, plan.config.launcher.chain)
        return EXIT_OK


def _entry(config: ResolvedConfig) -> list[str]:
    """How Python starts the entry script. A container has its own packages, not those of this interpreter."""
    script = script_path(config.script)
    return ["-m", config.script] if config.launcher.container is not None and is_installed() else [str(script)]


def submit(run_dir: Path, links: int) -> None:
    """Submit the run folder's batch script, once for each job of a chain, and print how to follow the job.

    Raises:
        LaunchError: Slurm refuses the job.
    """
    numbers = []
    try:
        for _ in range(links):
            numbers.append(scheduler.submit(run_dir / records.SCRIPT_FILE))
    finally:  # record what was submitted before a refusal: those jobs exist
        if numbers:
            records.record_submission(run_dir, numbers)
    more = f", to be followed by {', '.join(map(str, numbers[1:]))}" if links > 1 else ""
    print(f"submitted job {numbers[0]}{more}; run folder {run_dir}")
    for command in ("status", "logs --follow", "cancel", "requeue"):
        print(f"  python -m launch {command} {shlex.quote(str(run_dir))}")


def refuse_second_job(run_dir: Path) -> None:
    """Refuse to submit a run folder that already has a job.

    Raises:
        LaunchError: a job of this run folder is pending or running.
    """
    live = live_jobs(run_dir)
    if live:
        named = ", ".join(f"{job.number} ({job.state})" for job in live)
        raise LaunchError(
            f"train.run_dir={run_dir} has job {named} already; wait for it, end it with `python -m launch cancel "
            f"{shlex.quote(str(run_dir))}`, or give another train.run_dir"
        )


def live_jobs(run_dir: Path) -> list[scheduler.SlurmJob]:
    """The run folder's jobs that are pending or running."""
    numbers = [number for jobs in records.submissions(run_dir) for number in jobs]
    return [job for job in scheduler.jobs(numbers) if job.is_live]
