"""Renders a batch script: quoted values of the configuration, inserted into `job.sh.j2`.

The run's own settings never pass through a shell: the ranks read them from the frozen file.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from launch.base import LOOPBACK
from launch.machine import PORTS
from launch.scripts import CODE, is_installed
from launch.slurm.verdict import NOTHING_LEFT
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.rules.launcher import SECONDS_TO_CONCLUDE

TEMPLATE = Path(__file__).with_name("job.sh.j2")
TORCHRUN = ("-m", "launch.slurm.node")  # our `torchrun`, independent of PATH
# A port that differs between jobs on one node, and between attempts of a job in case it is taken.
PORT_OF_JOB = f"$(({PORTS.start} + (SLURM_JOB_ID * 7 + ${{SLURM_RESTART_COUNT:-0}}) % {len(PORTS)}))"


def batch_script(
    config: ResolvedConfig,
    run_dir: Path,
    environment: dict[str, str],
    rank_argv: Sequence[str],
    torchrun: Sequence[str] | None = None,
) -> str:
    """The batch script for `sbatch`.

    Args:
        config: valid.
        run_dir: absolute.
        environment: variables of every rank.
        rank_argv: script and arguments of a rank, without the interpreter.
        torchrun: the program that starts the ranks of one node; None = that of this interpreter, or of the container.
    """
    launcher = config.launcher
    python = "python3" if launcher.container is not None else sys.executable
    torchrun = torchrun or (python, *TORCHRUN)
    jinja = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    jinja.filters["quote"] = shlex.quote
    return jinja.from_string(TEMPLATE.read_text()).render(
        options=batch_options(config, run_dir),
        run_dir=str(run_dir),
        cwd=str(Path.cwd()),
        code=None if is_installed() else str(CODE),
        python=sys.executable,
        grace_seconds=math.ceil(launcher.grace_seconds),
        modules=launcher.modules,
        setup=launcher.setup,
        environment=environment,
        passed=launcher.pass_environment,
        master_address=LOOPBACK if _stays_on_node(config) else launcher.master_address,
        master_port=PORT_OF_JOB if launcher.master_port is None else launcher.master_port,
        srun_arguments=_srun_arguments(config),
        node_command=_node_command(config, torchrun, rank_argv),
        nothing_left=NOTHING_LEFT,
        max_requeues=launcher.max_requeues,
        max_stalled=launcher.max_stalled_requeues,
    )


def batch_options(config: ResolvedConfig, run_dir: Path) -> list[str]:
    """The options of the `#SBATCH` lines. sbatch reads quotes as a shell does, and expands `%` in file names."""
    launcher = config.launcher
    warning = math.ceil(launcher.grace_seconds) + SECONDS_TO_CONCLUDE
    options: dict[str, object] = {
        "job-name": launcher.job_name or run_dir.name,
        "nodes": launcher.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": config.processes_per_node * launcher.threads_per_process,
        "gres": None if launcher.gpus_per_node is None else f"gpu:{launcher.gpus_per_node}",
        "time": launcher.time,
        "partition": launcher.partition,
        "account": launcher.account,
        "qos": launcher.qos,
        "output": str(run_dir / "logs").replace("%", "%%") + "/slurm-%j.out",
        "open-mode": "append",
        "signal": f"B:USR1@{warning}",
        "dependency": "singleton" if launcher.chain > 1 else None,
    }
    lines = [shlex.quote(f"--{name}={value}") for name, value in options.items() if value is not None]
    return [*lines, "--requeue", *map(shlex.quote, launcher.sbatch_options)]


def _srun_arguments(config: ResolvedConfig) -> list[str]:
    """Explicit counts: otherwise srun prefers those of the batch job to its own options.

    When the tasks of one node have ended, those of the others have the grace period to follow; then srun kills them.
    """
    launcher = config.launcher
    arguments = [f"--nodes={launcher.nodes}", f"--ntasks={launcher.nodes}", "--ntasks-per-node=1"]
    arguments.append(f"--wait={math.ceil(launcher.grace_seconds)}")
    if launcher.container is not None:
        arguments += [f"--container-image={launcher.container}", f"--container-workdir={Path.cwd()}"]
    if launcher.container_mounts:
        arguments.append(f"--container-mounts={','.join(launcher.container_mounts)}")
    return [*arguments, *launcher.srun_arguments]


def _stays_on_node(config: ResolvedConfig) -> bool:
    """Whether no other machine needs to connect to the ranks."""
    return config.launcher.nodes == 1 and config.launcher.master_address is None


def _node_command(config: ResolvedConfig, torchrun: Sequence[str], rank_argv: Sequence[str]) -> str:
    """The command of each node's shell: its node rank and the master's address are known only there."""
    launcher = config.launcher
    counts = [f"--nnodes={launcher.nodes}", f"--nproc-per-node={config.processes_per_node}", "--max-restarts=0"]
    place = '--node-rank="$SLURM_NODEID" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT"'
    begin = "exec"
    if not is_installed():
        begin = f"PYTHONPATH={shlex.quote(str(CODE))}${{PYTHONPATH:+:$PYTHONPATH}} exec"
    if _stays_on_node(config):
        counts.append(f"--local-addr={LOOPBACK}")  # otherwise torchrun resolves the node's name
    return f"{begin} {shlex.join([*torchrun, *counts])} {place} {shlex.join(rank_argv)}"
