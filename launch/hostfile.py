"""deepspeed's hostfile: a line `HOST slots=N` for each machine, in the order of their ranks."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_lite.config.facts import ranges_of_numbers
from megatron_lite.config.keys import shown
from megatron_lite.config.ranges import MOST_PROCESSES
from megatron_lite.config.rules.values import require_form
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import ConfigError

LINE = re.compile(r"([\w.:-]+)\s+slots=(\d+)", re.ASCII)
MOST_DIGITS = 9
MOST_SLOTS = int(ranges_of_numbers()["launcher.processes_per_node"].most)
MOST_BYTES = 2**24  # some hundred thousand lines: anything longer is not a hostfile


@dataclass(frozen=True)
class Host:
    name: str
    slots: int
    """Number of ranks on this machine."""


def read_hostfile(path: Path | str) -> list[Host]:
    """The hosts in a file; empty lines and lines that begin with # are ignored.

    Raises:
        ConfigError: lists every line that is wrong.
    """
    lines = _lines(Path(path))
    hosts: list[Host] = []
    named: set[str] = set()
    problems: list[str] = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        host = Host(match[1], int(match[2][: MOST_DIGITS + 1])) if match else None  # more digits are too many anyway
        problem = _problem(line, host, hosts, named)
        if problem:
            problems.append(f"launcher.hostfile={path} line {number}: {problem}")
        elif host is not None:
            hosts.append(host)
            named.add(host.name)
    if not hosts and not problems:
        problems.append(f"launcher.hostfile={path} names no host; write lines `HOST slots=N`")
    if not problems and len(hosts) * hosts[0].slots > MOST_PROCESSES:
        problems.append(
            f"launcher.hostfile={path} has {len(hosts)} hosts x {hosts[0].slots} slots, more than the {MOST_PROCESSES} "
            "processes that a plan can list; name fewer hosts"
        )
    if problems:
        raise ConfigError(problems)
    return hosts


def _lines(path: Path) -> list[str]:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # reading a device or a pipe may never end
            raise OSError(22, "not a file")
        if path.stat().st_size > MOST_BYTES:
            raise OSError(27, f"longer than {MOST_BYTES} bytes")
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text"
        raise ConfigError(
            f"launcher.hostfile={path} cannot be read ({reason}); give a file of lines `HOST slots=N`"
        ) from error


def _problem(line: str, host: Host | None, above: list[Host], named: set[str]) -> str | None:
    """What is wrong with a line, by itself or compared to the lines above it."""
    if host is None or host.slots == 0:
        return f"{shown(line)!r} is not `HOST slots=N` with N >= 1; write it like `node1 slots=8`"
    if host.slots > MOST_SLOTS:
        return (
            f"{shown(line)!r} has more slots than {MOST_SLOTS}, the most that a machine runs; use at most {MOST_SLOTS}"
        )
    if host.name in named:
        return f"{host.name} stands above already; give each host one line, with all its slots"
    if above and host.slots != above[0].slots:
        return (
            f"{host.name} has slots={host.slots}, {above[0].name} has slots={above[0].slots}; give every host the same "
            "number"
        )
    return None


def with_hosts(config: RunConfig) -> RunConfig:
    """The configuration with nodes and processes per node from its hostfile, if it has one.

    Raises:
        ConfigError: the file is wrong, or contradicts a setting.
    """
    launcher = config.launcher
    if launcher.hostfile is None:
        return config
    require_form(config, "launcher.hostfile")
    hostfile = os.path.expanduser(launcher.hostfile)
    launcher = replace(launcher, hostfile=hostfile)  # deepspeed gets it as well
    hosts = read_hostfile(hostfile)
    nodes, slots = len(hosts), hosts[0].slots
    problems = [
        f"launcher.{key}={given}, but {launcher.hostfile} has {what}; leave launcher.{key} out, or change the file"
        for key, given, found, what in (
            ("nodes", launcher.nodes if launcher.nodes != 1 else nodes, nodes, f"{nodes} hosts"),
            ("processes_per_node", launcher.processes_per_node, slots, f"slots={slots}"),
            ("num_processes", launcher.num_processes, nodes * slots, f"{nodes} hosts x {slots} slots"),
        )
        if given is not None and given != found
    ]
    if problems:
        raise ConfigError(problems)
    return replace(config, launcher=replace(launcher, nodes=nodes, processes_per_node=slots))
