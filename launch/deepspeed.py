"""DeepSpeed's own launcher: `deepspeed --no_local_rank --num_gpus N ... script.py --config FILE`.

On a CPU `--num_gpus` counts processes. A SIGTERM to `deepspeed` would leave its workers behind, so it runs in a session
of its own that is ended as a whole.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

from launch.base import LOOPBACK, LaunchPlan, make_plan
from launch.environment import apply
from launch.messages import show_error, told_end
from launch.preparation import Preparation, Prepare, prepare_data, run_folder
from launch.processes import POLL_SECONDS, Children, Ending, replace_process, start
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import EXIT_FAILURE, EXIT_OK, LaunchError, RunEnd
from megatron_lite.observe.markers import ask_to_stop

HELPERS_SECONDS = 5.0  # what the ranks' own helpers, such as an uploader of metrics, may take to follow them


class DeepSpeedLauncher:
    """Starts the ranks of one machine through the `deepspeed` command.

    Args:
        prepare: makes the data ready, in a process of its own.
    """

    def __init__(self, prepare: Prepare = prepare_data) -> None:
        self._prepare = prepare

    def plan(self, config: RunConfig) -> LaunchPlan:
        def argv(script: Path, frozen_config: Path, port: int) -> list[str]:
            return [
                deepspeed_command(),
                "--no_local_rank",
                *("--num_gpus", str(config.launcher.num_processes)),
                *("--master_addr", config.launcher.master_address or LOOPBACK),
                *("--master_port", str(port)),
                *("--log_level", "critical"),  # it logs every environment and command it touches
                str(script),
                "--config",
                str(frozen_config),
            ]

        return make_plan(config, argv)

    def run(self, plan: LaunchPlan) -> int:
        with Ending().watching() as ending:
            with Preparation(plan.config, self._prepare) as preparation:
                code = preparation.wait(ending)
            if code != EXIT_OK:
                return code
            apply(plan.env, overwrite=True)
            with run_folder(plan):
                pid = start(lambda: replace_process(plan.argv, dict(os.environ)), own_session=True)
                # DeepSpeed itself ends the others when one worker fails: nothing to wait for, only to clean up.
                children = Children([pid], as_groups=True, failure_grace_seconds=0.0)
                children.wait(
                    ending, lambda: ask_to_stop(plan.run_dir, ending.name), plan.config.launcher.grace_seconds
                )
                left_behind = _end_session(pid)
                return _conclude(plan, ending, children.ends[pid].status, left_behind)


def deepspeed_command() -> str:
    """The `deepspeed` of this interpreter's environment, activated or not."""
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    if found is None:
        raise LaunchError("launcher.name=deepspeed needs the `deepspeed` command; run `make install`, or use local")
    return found


def _end_session(pid: int) -> bool:
    """Kill what is left of the group that `pid` led; whether there was anything that did not end by itself."""
    deadline = time.monotonic() + HELPERS_SECONDS
    try:
        while time.monotonic() < deadline:
            os.killpg(pid, 0)  # raises once the group is empty
            time.sleep(POLL_SECONDS)
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _conclude(plan: LaunchPlan, ending: Ending, status: int, left_behind: bool) -> int:
    told = told_end(plan.run_dir, plan.error_file)
    if told is not None:
        return told
    if ending.signal:
        return ending.exit_code
    code = exit_code(status, left_behind)
    if code != EXIT_OK:
        show_error(f"deepspeed ended with exit code {status}; the ranks' logs lie in {plan.error_file.parent}")
    return code


def exit_code(status: int, left_behind: bool) -> int:
    """Our exit code for that of `deepspeed`.

    It passes a worker's code on, where a worker killed by signal n leaves 256 - n; but when its own worker launcher is
    killed it reports success, and leaves the workers behind.
    """
    if status < 0:
        return 128 - status
    if status > 256 - signal.NSIG:
        return 128 + 256 - status
    if status == EXIT_OK:
        return EXIT_FAILURE if left_behind else EXIT_OK
    return status if status in frozenset(RunEnd) else EXIT_FAILURE
