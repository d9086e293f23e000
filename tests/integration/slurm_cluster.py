"""A real Slurm with seven nodes on this machine: its daemons use one temporary folder and end with the block.

Debian's build has --enable-multiple-slurmd, so one machine can be several nodes, each with its own port. The nodes have
no network names, so jobs get `launcher.master_address=127.0.0.1`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAIN = ("n1", "n2", "n3")
FRAGILE = ("n4", "n5", "n6")  # for tests that take nodes down
CONTESTED = ("n7",)  # for jobs that preempt each other
NODES = (*MAIN, *FRAGILE, *CONTESTED)
CPUS = 16  # of each node, as configured in Slurm
GPUS = 4  # of each node, with /dev/null's device number: enough for Slurm to count and allocate them
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
START_SECONDS = 30.0
END_SECONDS = 10.0
# Time between TERM and KILL: long enough to finish a save on a slow machine. No test has a process that ignores TERM.
KILL_WAIT_SECONDS = 60
JOBS_END_SECONDS = KILL_WAIT_SECONDS + 20.0

# cred_expire: a requeued job waits until the credential of its last start has expired: 121 s with the default of 120.
# GraceTime: the time that a preempted job gets before TERM and KILL.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
SlurmctldPort={controller_port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ReturnToService=1
KillWait={kill_wait}
MinJobAge=3600
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes={main} Default=YES PreemptMode=off State=UP
PartitionName=fragile Nodes={fragile} PreemptMode=off State=UP
PartitionName=low Nodes={contested} PriorityTier=1 PreemptMode=requeue GraceTime=30 State=UP
PartitionName=high Nodes={contested} PriorityTier=100 PreemptMode=off State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} CoresPerSocket={cpus} "
    "Gres=gpu:{gpus} State=UNKNOWN"
)


class SlurmMissingError(Exception):
    """Slurm cannot be started here."""


@dataclass(frozen=True)
class Cluster:
    """A running cluster: its folder and its commands."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """Variables that a user's shell needs to reach it."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def call(self, *command: str) -> str:
        """Run one of Slurm's commands, which must succeed; return its standard output."""
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=os.environ | self.environment, check=False
        )
        assert finished.returncode == 0, f"{' '.join(command)}: {finished.stderr}"
        return finished.stdout

    def job(self, job_id: int) -> dict[str, str]:
        """The fields of `scontrol show job`, such as JobState and Restarts."""
        words = self.call("scontrol", "-o", "show", "job", str(job_id)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """The cluster for the duration of the block.

    Raises:
        SlurmMissingError: a program is missing (the first one is named), or we are not root, which slurmd requires.
    """
    if os.geteuid() != 0:
        raise SlurmMissingError("a cluster of tests needs root")
    for program in PROGRAMS:
        if shutil.which(program) is None:
            raise SlurmMissingError(f"{program} is not installed: apt-get install slurmctld slurmd slurm-client munge")
    cluster = Cluster(folder)
    _configure(folder)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        daemons.append(_start(folder, _munged(folder), "munged"))
        _wait_for(lambda: (folder / "munge" / "socket").exists(), folder)
        daemons.append(_start(folder, ["slurmctld", "-D", "-c", "-f", f"{folder}/slurm.conf"], "slurmctld"))
        for name in NODES:
            daemons.append(_start(folder, ["slurmd", "-D", "-f", f"{folder}/slurm.conf", "-N", name], name))
        _wait_for(lambda: _idle_nodes(cluster) == len(NODES), folder)
        yield cluster
    finally:
        _end(cluster, daemons)


def _configure(folder: Path) -> None:
    host = socket.gethostname().partition(".")[0]
    ports = _free_ports(len(NODES) + 1)
    nodes = [
        NODE.format(name=name, host=host, port=port, cpus=CPUS, gpus=GPUS)
        for name, port in zip(NODES, ports[1:], strict=True)
    ]
    text = SLURM_CONF.format(
        host=host,
        folder=folder,
        controller_port=ports[0],
        kill_wait=KILL_WAIT_SECONDS,
        nodes="\n".join(nodes),
        main=",".join(MAIN),
        fragile=",".join(FRAGILE),
        contested=",".join(CONTESTED),
    )
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "gres.conf").write_text(
        "".join(f"NodeName={name} Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n" for name in NODES)
    )
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o700)
    (folder / "munge" / "key").write_bytes(os.urandom(128))
    (folder / "munge" / "key").chmod(0o400)
    for number in range(GPUS):  # without a device file Slurm sets no CUDA_VISIBLE_DEVICES
        os.mknod(folder / f"gpu{number}", 0o600 | stat.S_IFCHR, os.makedev(1, 3))


def _free_ports(count: int) -> list[int]:
    """Different free ports: all are held until the last one is found."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


def _munged(folder: Path) -> list[str]:
    return [
        "munged",
        "--foreground",
        "--force",
        f"--key-file={folder}/munge/key",
        f"--socket={folder}/munge/socket",
        f"--pid-file={folder}/munge/pid",
        f"--log-file={folder}/munge/log",
        f"--seed-file={folder}/munge/seed",
    ]


def _start(folder: Path, command: list[str], name: str) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.out").open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"SLURM_CONF": f"{folder}/slurm.conf"},
        )


def _idle_nodes(cluster: Cluster) -> int:
    finished = subprocess.run(
        ["sinfo", "-h", "-N", "-p", "main,fragile,high", "-o", "%T"],
        capture_output=True,
        text=True,
        env=os.environ | cluster.environment,
        check=False,
    )
    return finished.stdout.split().count("idle")


def _wait_for(is_there, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_there():
        assert time.monotonic() < deadline, "Slurm did not start:\n" + "\n".join(
            f"{path.name}: {path.read_text(errors='replace')[-500:]}" for path in sorted(folder.glob("*.out"))
        )
        time.sleep(0.05)


def _end(cluster: Cluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    """Cancel running jobs, then end the daemons, each by its own pid."""
    with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
        cluster.call("scancel", "--user=root", "--signal=KILL", "--full")
        cluster.call("scancel", "--user=root")
        deadline = time.monotonic() + JOBS_END_SECONDS  # processes that slurmd has started would outlive it
        while cluster.call("squeue", "--noheader").strip() and time.monotonic() < deadline:
            time.sleep(0.2)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for daemon in daemons:
            if daemon.poll() is None:
                daemon.send_signal(number)
        deadline = time.monotonic() + END_SECONDS
        while any(daemon.poll() is None for daemon in daemons) and time.monotonic() < deadline:
            time.sleep(0.05)
