"""The default launcher: one process of this machine imports the libraries and forks all ranks.

Importing torch and DeepSpeed takes each process seconds of CPU time. Here one process imports them while the data is
prepared, then forks: all ranks start within milliseconds and share the libraries' memory. On CUDA each rank is a
fresh process instead: if a library opens the driver in the parent, forked ranks cannot use the GPUs.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from launch.base import LaunchPlan, make_plan
from launch.environment import apply
from launch.messages import show_error, show_left_error, tail
from launch.preparation import Preparation, Prepare, prepare_data, run_folder
from launch.processes import Children, End, Ending, replace_process, start
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.errors import EXIT_FAILURE, EXIT_OK, LaunchError, RunEnd
from megatron_lite.observe.markers import ask_to_stop
from megatron_lite.observe.run_lock import require_free

# Slow to import, in this order. torch's optimizers import torch._dynamo at first use, in every rank.
EXPLAINED = frozenset(RunEnd) - {RunEnd.DONE, RunEnd.FAILED}
"""Exit codes of ranks that know why they ended, and have left a message."""
WARM_MODULES = ("torch", "torch._dynamo", "megatron_lite.train.run")


class LocalLauncher:
    """Starts the ranks of one machine.

    Args:
        fork: fork the ranks from the warm parent; None = on CPUs only.
        warm_modules: what the parent imports before it forks.
        prepare: prepares the data, in a separate process.
    """

    def __init__(
        self,
        fork: bool | None = None,
        warm_modules: tuple[str, ...] = WARM_MODULES,
        prepare: Prepare = prepare_data,
    ) -> None:
        self._fork = fork
        self._warm_modules = warm_modules
        self._prepare = prepare

    def plan(self, config: ResolvedConfig) -> LaunchPlan:
        plan = make_plan(config, lambda script, path, port: [sys.executable, str(script), "--config", str(path)])
        size = str(plan.num_processes)
        ranks = map(str, range(plan.num_processes))
        return replace(
            plan,
            rank_envs=[
                {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size} for rank in ranks
            ],
        )

    def run(self, plan: LaunchPlan) -> int:
        forks = plan.config.launcher.device == "cpu" if self._fork is None else self._fork
        with Ending().watching() as ending:
            require_free(plan.run_dir, plan.attempt)
            # the child is forked before the imports because it needs none of them
            with Preparation(plan.config, self._prepare) as preparation:
                apply(plan.env, overwrite=True)
                body = _warm_body(plan, self._warm_modules, preparation, ending) if forks else _fresh_body(plan)
                code = preparation.wait(ending)
            if code != EXIT_OK or body is None:
                return code
            with run_folder(plan, ending) as beat:
                logs_before = [_size(plan.log_file(rank)) for rank in range(plan.num_processes)]
                ranks = _start_ranks(body, plan.rank_envs, beat)
                ranks.wait(ending, lambda: ask_to_stop(plan.run_dir, ending.name), plan.config.launcher.grace_seconds)
                return _conclude(plan, ranks, ending, logs_before)


Body = Callable[[], int]


def _start_ranks(body: Body, rank_envs: list[dict[str, str]], beat: Callable[[], None]) -> Children:
    """Start all ranks or none.

    Raises:
        LaunchError: the system does not allow that many processes.
    """
    ranks = Children([], ending_grace_seconds=0.0, each_poll=beat)
    try:
        for rank_env in rank_envs:
            ranks.pids.append(start(_rank_body(body, rank_env)))
    except OSError as error:
        ranks.end()
        raise LaunchError(
            f"launcher.num_processes={len(rank_envs)}: only {len(ranks.pids)} could be started ({error.strerror}); use "
            "a smaller layout, or raise the limits on processes and memory"
        ) from error
    return ranks


def _rank_body(body: Body, rank_env: dict[str, str]) -> Body:
    def run() -> int:
        os.environ.update(rank_env)
        return body()

    return run


def _fresh_body(plan: LaunchPlan) -> Body:
    return lambda: replace_process(plan.argv, dict(os.environ))


def _warm_body(plan: LaunchPlan, modules: tuple[str, ...], preparation: Preparation, ending: Ending) -> Body | None:
    """What a forked rank runs; None if the preparation failed, or we were asked to end, before all was imported."""
    for name in modules:
        if preparation.failed or ending.signal:
            return None
        importlib.import_module(name)
    script = _load_script(Path(plan.argv[1]))
    gc.collect()
    gc.freeze()  # otherwise each rank's garbage collector writes to, and so copies, every page of the imported modules
    return lambda: script.main(list(plan.argv[2:]))


def _load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _conclude(plan: LaunchPlan, ranks: Children, ending: Ending, logs_before: list[int]) -> int:
    """Report what went wrong, once, and combine the ends of all ranks into one exit code."""
    if not ranks.failed and not ending.signal:
        return EXIT_OK
    if all(end.status == RunEnd.PREEMPTED for end in ranks.ends.values()):
        return RunEnd.PREEMPTED  # the ranks have reported it
    if ending.signal:
        return ending.exit_code
    pid = culprit(ranks.ends)
    rank, end = ranks.pids.index(pid), ranks.ends[pid]
    if end.status in EXPLAINED and show_left_error(plan.error_file):
        return end.status
    place = plan.config.topology.coordinates(rank)
    who = f"rank {rank} (pp{place.pipeline} dp{place.data} tp{place.tensor})"
    what = _killed_by(-end.status) if end.status < 0 else f"ended with exit code {end.status}"
    log = plan.log_file(rank)
    last = tail(log, logs_before[rank])
    show_error(f"{who} {what}" + (f"; see {log}" if last else ""))
    for line in last if end.status > 0 else []:
        print(f"  | {line}", file=sys.stderr)
    sys.stderr.flush()
    return 128 - end.status if end.status < 0 else end.status if end.status in EXPLAINED else EXIT_FAILURE


def _killed_by(number: int) -> str:
    hint = ": out of memory, or by hand" if number == signal.SIGKILL else ""
    return f"was killed by signal {number} ({signal.Signals(number).name}{hint})"


def culprit(ends: dict[int, End]) -> int:
    """The process whose end explains the others'.

    After one failure the others lose their connections, sometimes before the failed process has ended. So a user error,
    or a report of a hang, explains more than a kill from outside, and that explains more than an exception; among
    equals the first one counts.
    """

    def rank_of_cause(item: tuple[int, End]) -> int:
        end = item[1]
        if end.status == 0 or (end.by_us and end.status < 0):
            return 3
        return 0 if end.status in EXPLAINED else 1 if end.status < 0 else 2

    return min(ends.items(), key=rank_of_cause)[0]
