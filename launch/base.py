"""What a launcher is: it turns a configuration into a plan, which is plain data, and carries a plan out."""

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
    """All that a launcher is going to do."""

    config: ResolvedConfig
    run_dir: Path
    files: dict[Path, str]
    """Written before the start: the frozen configuration, and a batch script."""
    argv: tuple[str, ...]
    """The command: of each rank, or of the one program that starts all ranks."""
    env: dict[str, str]
    """Added to the environment of every rank."""
    rank_envs: list[dict[str, str]] = field(default_factory=list)
    """Added for one rank each; empty where the command itself tells its ranks who they are."""
    node_argvs: tuple[tuple[str, ...], ...] = ()
    """The command of each node, where each has its own and is started by itself."""
    by_hand: tuple[tuple[str, ...], ...] = ()
    """A command for each node that does the same without ssh, to be shown."""
    asked_node_rank: int | None = None
    """What the settings say of this machine. It is in no file: all nodes come to the same configuration."""
    node_rank: int | None = None
    """Of this machine, once it is to be known; None = there is one machine, or all nodes are alike."""
    job: str = ""
    """What nodes of one job have in common and no other job has; empty where one machine starts everything."""
    own_presets: tuple[str, ...] = ()
    """The user's presets that are in it, and what they stand for."""
    changes: tuple[Change, ...] = ()
    """What differs from the configuration with which the run in this folder last ran, for --dry-run."""
    batch_script: Path | None = None
    """That of `files` which a scheduler is given; None = the ranks start here and now."""

    @property
    def num_processes(self) -> int:
        return self.config.launcher.num_processes

    @property
    def attempt(self) -> str:
        """What all ranks have in common; empty where a scheduler says it once it starts them."""
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
        """The command as it could be typed."""
        return shlex.join(self.argv)


class Launcher(Protocol):
    """One way to start the processes of a run."""

    def plan(self, config: ResolvedConfig) -> LaunchPlan:
        """What `run` would do, as data; touches nothing. `config` is valid."""

    def run(self, plan: LaunchPlan) -> int:
        """Do it and wait for its end, or hand it to a scheduler; returns the exit code: 0, that of a `RunEnd`, or
        128 + n for a signal."""


def make_plan(
    config: ResolvedConfig, argv: Callable[[Path, Path, int], list[str]], address: str | None = None
) -> LaunchPlan:
    """The parts of a plan that all launchers share.

    Args:
        argv: builds the command from (script, frozen configuration, port).
        address: where rank 0 listens, unless launcher.master_address says so; None = on this machine.
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
    passed_environment(config)  # that it is there
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
