"""Base of launchers that start one program on this machine, which starts the ranks: torchrun and deepspeed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from launch.base import LaunchPlan
from launch.environment import apply
from launch.messages import show_error, told_end
from launch.nodes import own_node_rank
from launch.preparation import Preparation, Prepare, prepare_data, run_folder
from launch.processes import Children, Ending, adopt_orphans, descendants, end_descendants, replace_process, start
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.errors import EXIT_OK, LaunchError
from megatron_lite.observe.markers import ask_to_stop
from megatron_lite.observe.run_lock import require_free

HELPERS_SECONDS = 5.0  # time for the ranks' helpers, such as an uploader of metrics, to end after them


class ProgramLauncher:
    """Runs the program of a plan to its end, and leaves none of its processes behind.

    Args:
        prepare: prepares the data, in a separate process. With several nodes each launcher does it: one gets the lock
            and builds, the others wait for it.
    """

    program: ClassVar[str]
    names_culprit: ClassVar[bool] = False
    """The program has reported which rank failed if it ends with an exit code."""

    def __init__(self, prepare: Prepare = prepare_data) -> None:
        self._prepare = prepare

    def plan(self, config: ResolvedConfig) -> LaunchPlan:
        raise NotImplementedError

    def run(self, plan: LaunchPlan) -> int:
        plan = on_this_node(plan)
        with Ending().watching() as ending:
            require_free(plan.run_dir, plan.attempt)
            with Preparation(plan.config, self._prepare) as preparation:
                code = preparation.wait(ending)
            if code != EXIT_OK:
                return code
            apply(plan.env, overwrite=True)
            with run_folder(plan, ending) as beat:
                status, left_behind = self._run_program(plan, ending, beat)
                return self._conclude(plan, ending, status, left_behind)

    def _run_program(self, plan: LaunchPlan, ending: Ending, beat: Callable[[], None]) -> tuple[int, bool]:
        """The program's exit code, or minus its signal, and whether it left processes behind (which are ended)."""
        adopt_orphans()  # torchrun's ranks have their own sessions: only as descendants can all be found
        others = descendants()
        pid = start(lambda: self._become(plan.argv), own_session=True)
        # The program itself ends the other ranks when one fails, so we need no grace period.
        children = Children(
            [pid],
            as_groups=True,
            failure_grace_seconds=0.0,
            ending_grace_seconds=HELPERS_SECONDS,
            each_poll=beat,
        )
        children.wait(ending, lambda: ask_to_stop(plan.run_dir, ending.name), plan.config.launcher.grace_seconds)
        left_behind = end_descendants(HELPERS_SECONDS, others)
        return children.ends[pid].status, left_behind

    def _become(self, argv: Sequence[str]) -> int:
        """Replace the child process by the program."""
        replace_process(argv, dict(os.environ))

    def _conclude(self, plan: LaunchPlan, ending: Ending, status: int, left_behind: bool) -> int:
        told = told_end(plan.run_dir, plan.error_file)
        if told is not None:
            return told
        if ending.signal:
            return ending.exit_code
        code = self.exit_code(status, left_behind)
        if code != EXIT_OK and not (self.names_culprit and status > 0):
            logs = plan.error_file.parent
            show_error(f"{self.program} ended with exit code {status}; the ranks' logs lie in {logs}")
        return code

    def exit_code(self, status: int, left_behind: bool) -> int:
        """Our exit code for the program's."""
        return 128 - status if status < 0 else status


def on_this_node(plan: LaunchPlan) -> LaunchPlan:
    """The plan with this machine's node rank and command, if each node has its own.

    Raises:
        LaunchError: the node rank is not known.
    """
    if not plan.node_argvs:
        return plan
    rank = own_node_rank(plan.asked_node_rank, len(plan.node_argvs))
    return replace(plan, argv=plan.node_argvs[rank], node_rank=rank)


def installed(program: str, package: str) -> str:
    """The path of a command in this interpreter's environment, activated or not.

    Raises:
        LaunchError: it is not installed.
    """
    beside = Path(sys.executable).with_name(program)
    found = str(beside) if beside.exists() else shutil.which(program)
    if found is None:
        raise LaunchError(
            f"launcher.name={program} needs the `{program}` command of {package}; run `make install`, or on one "
            "machine use launcher=local"
        )
    return found
