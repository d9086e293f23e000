"""Settings of launchers: who starts the processes of a run, where, and what happens when they are stopped."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class LauncherName(StrEnum):
    local = "local"  # one process imports the libraries and forks the ranks of this machine
    torchrun = "torchrun"
    deepspeed = "deepspeed"
    slurm = "slurm"  # a batch job: srun starts torchrun on every node


class Rendezvous(StrEnum):
    static = "static"  # node ranks are given; the node of rank 0 is at master_address
    c10d = "c10d"  # the same command on every node; torchrun numbers them


@dataclass
class LauncherConfig:
    """Who starts the processes of a run, and where."""

    name: LauncherName = LauncherName.local
    """Who starts the ranks."""
    num_processes: int | None = None
    """Processes to start; None = nodes x processes_per_node where that is given, else data x tensor x pipeline, or one
    per visible GPU where data is None."""
    threads_per_process: int = 1
    """OMP_NUM_THREADS of each rank."""
    master_address: str | None = None
    """Where rank 0 listens; None = this machine (127.0.0.1), or the first node of a job."""
    master_port: int | None = None
    """Port of rank 0; None = a free port, or one derived from the job ID."""
    device: str = "auto"
    """auto = CUDA where there are enough GPUs, else cpu; or `cpu` / `cuda`."""
    nodes: int = 1
    """Machines of the job; more than one needs launcher=torchrun, deepspeed or slurm."""
    gpus_per_node: int | None = None
    """GPUs per node that slurm requests; None = none, and the ranks compute on CPUs."""
    processes_per_node: int | None = None
    """Ranks on each node; None = gpus_per_node, or num_processes / nodes."""
    grace_seconds: float = 120.0
    """Time for the ranks to save and to end once asked to stop; then they are killed."""
    # launcher=torchrun
    node_rank: int | None = None
    """Rank of this machine in `nodes`; None = 0 on one machine, else NODE_RANK or GROUP_RANK from the environment."""
    rendezvous: Rendezvous = Rendezvous.static
    """How the nodes of torchrun meet."""
    rendezvous_id: str | None = None
    """Distinguishes c10d jobs with the same endpoint; None = derived from the run folder."""
    # launcher=deepspeed
    hostfile: str | None = None
    """File with lines `host slots=N`: deepspeed starts the ranks of all hosts from here. None = this machine only."""
    # launcher=slurm; put settings that all users of a site share into a preset, conf/launcher/NAME.yaml
    time: str | None = None
    """Time limit of a job, such as 24:00:00 or 2-12:00:00; None = the partition's."""
    partition: str | None = None
    """Slurm partition; None = the default of the cluster."""
    account: str | None = None
    """Slurm account to charge; None = your default."""
    qos: str | None = None
    """Slurm quality of service; None = the default of your account."""
    job_name: str | None = None
    """Name of the Slurm job; None = the run folder's name."""
    chain: int = 1
    """Jobs to submit at once, each starting when the one before it ends, for runs beyond the time limit."""
    max_requeues: int = 20
    """How often a job may requeue itself."""
    max_stalled_requeues: int = 2
    """How often in a row it may do so without a newer checkpoint."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load on every node."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that the batch script runs before srun, such as `source /apps/env.sh`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every rank, with their values; no secrets, since they are stored in the run folder."""
    pass_environment: list[str] = field(default_factory=list)
    """Names of variables that every rank gets from the launching shell. No file has their values: for API keys."""
    container: str | None = None
    """Image for srun's --container-image (pyxis)."""
    container_mounts: list[str] = field(default_factory=list)
    """Mounts for srun's --container-mounts: `/host/folder:/container/folder`."""
    sbatch_options: list[str] = field(default_factory=list)
    """Further `#SBATCH` options, such as `--constraint=h100`."""
    srun_arguments: list[str] = field(default_factory=list)
    """Further arguments of srun."""
