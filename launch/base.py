"""The interface of launchers: a launcher turns a configuration into a plan, which is plain data, and carries it out."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from launch.environment import ERROR_FILE, passed_environment, rank_environment
from launch.machine import free_port
from launch.nodes import NODES_PORT, is_loopback
from launch.scripts import script_path
from megatron_lite.config import frozen
from megatron_lite.config.changes import Change
from megatron_lite.config.derived import spans_machines
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.observe.run_lock import ATTEMPT

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class LaunchPlan:
    """Everything that a launcher is going to do."""

    config: ResolvedConfig
    run_dir: Path
    files: dict[Path, str]
    """Files written before the start: the frozen configuration, and a batch script."""
    argv: tuple[str, ...]
    """The command of each rank, or of the one program that starts all ranks."""
    env: dict[str, str]
    """Variables added to the environment of every rank."""
    rank_envs: list[dict[str, str]] = field(default_factory=list)
    """Variables added for each single rank; empty if the command itself numbers its ranks."""
    node_argvs: tuple[tuple[str, ...], ...] = ()
    """The command of each node, if each node has its own and is started separately."""
    by_hand: tuple[tuple[str, ...], ...] = ()
    """A command for each node that does the same without ssh, for display."""
    asked_node_rank: int | None = None
    """launcher.node_rank of this machine. It is in no file: all nodes compose the same configuration."""
    node_rank: int | None = None
    """Rank of this machine, once it is determined; None = there is one machine, or all nodes are alike."""
    job: str = ""
    """Identifies the job on all of its nodes; empty if one machine starts everything."""
    own_presets: tuple[str, ...] = ()
    """The user's presets in the configuration, and our presets that they replace."""
    changes: tuple[Change, ...] = ()
    """Differences from the configuration that this folder's run last ran with, for --dry-run."""
    batch_script: Path | None = None
    """The one of `files` that is submitted to a scheduler; None = the ranks start here and now."""

    @property
    def num_processes(self) -> int:
        return self.config.launcher.num_processes

    @property
    def attempt(self) -> str:
        """Identifies this attempt on all ranks; empty if a scheduler provides it at the start."""
        return self.env.get(ATTEMPT, "")

    @property
    def frozen_config(self) -> Path:
        return frozen.frozen_path(self.config, self.run_dir)

    @property
    def error_file(self) -> Path:
        return self.run_dir / "logs" / "error.txt"

    def log_file(self, rank: int) -> Path:
        return self.run_dir / "logs" / f"rank-{rank}.log"

    def command_line(self) -> str:
        """The command as a user would type it."""
        return shlex.join(self.argv)


class Launcher(Protocol):
    """One way to start the processes of a run."""

    def plan(self, config: ResolvedConfig) -> LaunchPlan:
        """What `run` would do, as data; has no side effects. `config` is valid."""

    def run(self, plan: LaunchPlan) -> int:
        """Start the ranks and wait for their end, or submit to a scheduler. Returns the exit code: 0, that of a
        `RunEnd`, or 128 + n for a signal."""


def make_plan(
    config: ResolvedConfig, argv: Callable[[Path, Path, int], list[str]], address: str | None = None
) -> LaunchPlan:
    """The parts of a plan that all launchers share.

    Args:
        argv: builds the command from (script, frozen configuration, port).
        address: where rank 0 listens, unless launcher.master_address is set; None = on this machine.
    """
    asked_node_rank = config.launcher.node_rank
    config = replace(config, launcher=replace(config.launcher, node_rank=None))
    run_dir = config.run_dir
    path = frozen.frozen_path(config, run_dir)
    launcher = config.launcher
    several = spans_machines(config)
    address = launcher.master_address or address or LOOPBACK
    port = launcher.master_port
    if port is None:
        port = NODES_PORT if several else free_port(address)
    passed_environment(config)  # check that the variables exist
    environment = rank_environment(config, one_machine=not several or is_loopback(address))
    environment |= launcher.environment
    environment |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        ATTEMPT: f"{address}:{port}/{path.stem}",
        ERROR_FILE: str(run_dir.absolute() / "logs" / "error.txt"),
    }
    return LaunchPlan(
        config=config,
        run_dir=run_dir,
        files={path: frozen.render(config)},
        argv=tuple(argv(script_path(config.script), path, port)),
        env=environment,
        asked_node_rank=asked_node_rank,
    )
