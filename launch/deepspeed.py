"""DeepSpeed's own launcher: on this machine, or with a hostfile on all of its hosts.

On this machine: `deepspeed --no_local_rank --num_gpus N ... script.py --config FILE`; on CPUs `--num_gpus` counts
processes. With a hostfile it starts all hosts from here through pdsh and ssh or, if launcher.node_rank is given,
this host only, so that each host is started separately. A SIGTERM to `deepspeed` may leave its workers running, so we
end all of its descendants too.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from launch.base import LOOPBACK, LaunchPlan, make_plan
from launch.environment import passed_environment
from launch.hostfile import read_hostfile
from launch.processes import Ending
from launch.program import ProgramLauncher, installed
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.errors import EXIT_FAILURE, EXIT_OK, ConfigError, RunEnd

ENV_FILE_VARIABLE = "DS_ENV_FILE"  # the file with variables for remote ranks, .deepspeed_env by default
ENV_FILE = "deepspeed.env"
PLAIN = re.compile(r"[\w@+=:,./-]*", re.ASCII)  # not interpreted by a shell, nor by pdsh with its %h and %n


class DeepSpeedLauncher(ProgramLauncher):
    """Starts the ranks through the `deepspeed` command."""

    program = "deepspeed"

    def plan(self, config: ResolvedConfig) -> LaunchPlan:
        hostfile = config.launcher.hostfile
        return _plan_of_this_machine(config) if hostfile is None else _plan_of_hosts(config, hostfile)

    def exit_code(self, status: int, left_behind: bool) -> int:
        return exit_code(status, left_behind)

    def _run_program(self, plan: LaunchPlan, ending: Ending, beat: Callable[[], None]) -> tuple[int, bool]:
        ours = plan.files.get(plan.run_dir / ENV_FILE)
        if ours is not None:
            os.environ[ENV_FILE_VARIABLE] = private_file(ours, plan.config)
        return super()._run_program(plan, ending, beat)


def exit_code(status: int, left_behind: bool) -> int:
    """Our exit code for that of `deepspeed`.

    It returns a worker's exit code, where a worker killed by signal n gives 256 - n. But if its own worker launcher is
    killed, it reports success and leaves the workers running.
    """
    if status < 0:
        return 128 - status
    if status > 256 - signal.NSIG:
        return 128 + 256 - status
    if status == EXIT_OK:
        return EXIT_FAILURE if left_behind else EXIT_OK
    return status if status in frozenset(RunEnd) else EXIT_FAILURE


def _command(
    config: ResolvedConfig, where: list[str], address: str, port: int, script: Path, frozen: Path
) -> list[str]:
    return [
        installed("deepspeed", "deepspeed"),
        "--no_local_rank",
        *where,
        *("--master_addr", address),
        *("--master_port", str(port)),
        *("--log_level", "critical"),  # otherwise it logs every environment and command
        str(script),
        "--config",
        str(frozen),
    ]


def _plan_of_this_machine(config: ResolvedConfig) -> LaunchPlan:
    address = config.launcher.master_address or LOOPBACK
    where = ["--num_gpus", str(config.launcher.num_processes)]
    return make_plan(config, lambda script, frozen, port: _command(config, where, address, port, script, frozen))


def _plan_of_hosts(config: ResolvedConfig, hostfile: str) -> LaunchPlan:
    hosts = read_hostfile(hostfile)
    address = config.launcher.master_address or hosts[0].name

    def plan(*where: str) -> LaunchPlan:
        options = ["--hostfile", hostfile, *where]
        return make_plan(
            config,
            lambda script, frozen, port: _command(config, options, address, port, script, frozen),
            address=hosts[0].name,
        )

    by_hand = [plan("--no_ssh", "--node_rank", str(rank)) for rank in range(len(hosts))]
    node_argvs = tuple(each.argv for each in by_hand)
    if config.launcher.node_rank is not None:
        return replace(by_hand[config.launcher.node_rank], node_argvs=node_argvs)
    # --force_multi: a hostfile with one host means that host, not this machine
    return _through_shells(replace(plan("--force_multi", "--launcher", "pdsh"), by_hand=node_argvs))


def _through_shells(plan: LaunchPlan) -> LaunchPlan:
    """The plan with a file of variables for remote ranks: DeepSpeed itself passes on only Python's and NCCL's.

    Raises:
        ConfigError: a path or variable that the hosts' shells would change; DeepSpeed does not quote.
    """
    paths = {"train.run_dir": str(plan.run_dir), "the working folder": os.getcwd()}
    variables = {f"the variable {name}": value for name, value in plan.env.items()}
    problems = [
        f"{name}={value!r} would be read by a shell on every host, and DeepSpeed does not quote it; use only letters, "
        "digits and @ + = : , . / - _, or start each host with launcher.node_rank"
        for name, value in (paths | variables).items()
        if not PLAIN.fullmatch(value)
    ]
    if problems:
        raise ConfigError(problems)
    file = plan.run_dir / ENV_FILE
    lines = [f"{name}={value}" for name, value in sorted(plan.env.items())]
    return replace(plan, files={**plan.files, file: "".join(line + "\n" for line in lines)})


def private_file(ours: str, config: ResolvedConfig) -> str:
    """The path of an in-memory file, for our child processes only, with all variables for remote ranks.

    The user's own files, and the values of launcher.pass_environment, may hold secrets, so nothing is written to disk.
    """
    passed = passed_environment(config)
    bad = [name for name, value in passed.items() if not PLAIN.fullmatch(value)]
    if bad:
        raise ConfigError(
            [
                f"launcher.pass_environment names {name}, whose value a shell on every host would read, and DeepSpeed "
                "does not quote it; leave it out and set it on each host (~/.bashrc), or start each host with "
                "launcher.node_rank"
                for name in bad
            ]
        )
    lines = [*_own_variables(), *(f"{name}={value}" for name, value in passed.items())]
    descriptor = os.memfd_create(ENV_FILE, flags=0)  # the program inherits it
    with os.fdopen(descriptor, "w", closefd=False) as file:
        file.write("".join(line + "\n" for line in lines) + ours)
    return f"/proc/self/fd/{descriptor}"


def _own_variables() -> list[str]:
    """Lines of the user's own variable files, which DeepSpeed does not read when it gets ours."""
    name = os.environ.get(ENV_FILE_VARIABLE, ".deepspeed_env")
    files = [folder / name for folder in (Path.home(), Path.cwd())]
    return [line for file in files if file.is_file() for line in file.read_text().splitlines() if "=" in line]
