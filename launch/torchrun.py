"""torchrun on one machine or on several, each of which runs this launcher.

Every node composes the same configuration and so writes the same frozen file; only torchrun's command line differs, by
the node's rank.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.base import LOOPBACK, LaunchPlan, make_plan
from launch.environment import ERROR_FILE
from launch.messages import show_error
from launch.nodes import is_loopback
from launch.processes import Ending
from launch.program import ProgramLauncher, installed
from megatron_lite.config.launcher import LauncherConfig, Rendezvous
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.errors import EXIT_OK, EXIT_USER_ERROR, RunEnd
from megatron_lite.observe.run_lock import ATTEMPT

CANNOT_START = 126  # no rank exits with it; shells use it for a program that cannot be run
JOIN_SECONDS = 600  # how long torchrun's static rendezvous waits for other nodes; c10d would give up after 60


class TorchrunLauncher(ProgramLauncher):
    """Starts the ranks of this machine through `torchrun`."""

    program = "torchrun"
    names_culprit = True

    def plan(self, config: ResolvedConfig) -> LaunchPlan:
        def argv(script: Path, frozen_config: Path, port: int) -> list[str]:
            return [
                installed("torchrun", "torch"),
                *("--nnodes", str(config.launcher.nodes)),
                *("--nproc-per-node", str(config.processes_per_node)),
                *_meeting_place(config.launcher, port, f"{frozen_config.parent.name}-{frozen_config.stem}"),
                *("--max-restarts", "0"),  # a restart would skip what happens between the attempts of a run
                *("--shutdown-timeout", str(math.ceil(config.launcher.grace_seconds))),
                str(script),
                "--config",
                str(frozen_config),
            ]

        plan = make_plan(config, argv)
        if config.launcher.rendezvous is Rendezvous.static:
            argvs = tuple(_of_node(plan.argv, rank) for rank in range(config.launcher.nodes))
            return replace(plan, argv=argvs[0], node_argvs=argvs if len(argvs) > 1 else ())
        # No node knows its rank before the rendezvous, so the first one takes the run folder for the whole job.
        job = " ".join(plan.argv[1:]) if config.launcher.nodes > 1 else ""
        attempt = hashlib.sha256(job.encode()).hexdigest()[:12] if job else plan.attempt
        return replace(plan, job=job, env={**plan.env, ATTEMPT: attempt})

    def _become(self, argv: Sequence[str]) -> int:
        """Run `torchrun`, without its traceback about a rank that has already reported its error."""
        from torch.distributed.elastic.multiprocessing.api import SignalException  # torch takes seconds to import
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import main

        logging.disable(logging.CRITICAL)
        listen_where_needed()
        try:
            main(list(argv[1:]))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            return _tell(rank, failure.exitcode)
        except SignalException as error:
            return 128 + error.sigval
        except Exception as error:
            first_line = str(error).partition("\n")[0]
            show_error(f"torchrun could not start the ranks: {type(error).__name__}: {first_line}")
            return CANNOT_START
        return EXIT_OK

    def _conclude(self, plan: LaunchPlan, ending: Ending, status: int, left_behind: bool) -> int:
        if status == CANNOT_START:  # a marker in the folder is then from an earlier attempt
            return EXIT_USER_ERROR
        return super()._conclude(plan, ending, status, left_behind)


def listen_where_needed() -> None:
    """Make torchrun's own stores listen at their published address only, not on all interfaces of the machine."""
    import torch.distributed as dist
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, static_tcp_rendezvous

    from megatron_lite.parallel.stores import tcp_store

    for module in (dist, c10d_rendezvous_backend, static_tcp_rendezvous):
        module.TCPStore = tcp_store


def _tell(rank: int, status: int) -> int:
    """Report the rank that failed first, unless it has reported itself; returns our exit code for its status."""
    log = Path(os.environ[ERROR_FILE]).with_name(f"rank-{rank}.log")
    if status < 0:
        show_error(f"rank {rank} was killed by signal {-status} ({signal.Signals(-status).name}); see {log}")
        return 128 - status
    if status == RunEnd.FAILED or status not in frozenset(RunEnd):
        show_error(f"rank {rank} ended with exit code {status}; see {log}")
    return status


def _meeting_place(launcher: LauncherConfig, port: int, run: str) -> list[str]:
    """torchrun's options for the rendezvous, except the node rank."""
    address = launcher.master_address or LOOPBACK
    local = ["--local-addr", address] if is_loopback(address) else []  # otherwise its own name, which may not resolve
    if launcher.rendezvous is Rendezvous.static:
        return ["--master-addr", address, "--master-port", str(port), *local]
    return [
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:{port}"),
        *("--rdzv-id", launcher.rendezvous_id or run),
        *("--rdzv-conf", f"read_timeout={JOIN_SECONDS}"),
        *local,
    ]


def _of_node(argv: tuple[str, ...], rank: int) -> tuple[str, ...]:
    return (*argv[:3], "--node-rank", str(rank), *argv[3:])
