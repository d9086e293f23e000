"""Settings of launchers: who starts the processes of a run, where, and what happens when they are stopped."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from megatron_lite.config import ranges, texts
from megatron_lite.config import resume_effects as effects
from megatron_lite.config.setting import SAFE, setting


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

    name: LauncherName = setting(LauncherName.local, resume=SAFE)
    """Who starts the ranks."""
    num_processes: int | None = setting(None, range=ranges.PROCESSES, resume=SAFE)
    """Processes to start; None = nodes x processes_per_node where that is given, else data x tensor x pipeline, or one
    per visible GPU where data is None."""
    threads_per_process: int = setting(1, range=ranges.THREADS, resume=SAFE)
    """OMP_NUM_THREADS of each rank."""
    master_address: str | None = setting(None, text=texts.host, resume=SAFE)
    """Where rank 0 listens; None = this machine (127.0.0.1), or the first node of a job."""
    master_port: int | None = setting(None, range=ranges.PORT, resume=SAFE)
    """Port of rank 0; None = a free port, or one derived from the job ID."""
    device: str = setting("auto", text=texts.device, resume=effects.MASKS)  # CPU and GPU random generators differ
    """auto = CUDA where there are enough GPUs, else cpu; or `cpu` / `cuda`."""
    nodes: int = setting(1, range=ranges.PROCESSES, resume=SAFE)
    """Machines of the job; more than one needs launcher=torchrun, deepspeed or slurm."""
    gpus_per_node: int | None = setting(None, range=ranges.THREADS, resume=SAFE)
    """GPUs per node that slurm requests; None = none, and the ranks compute on CPUs."""
    processes_per_node: int | None = setting(None, range=ranges.THREADS, resume=SAFE)
    """Ranks on each node; None = gpus_per_node, or num_processes / nodes."""
    grace_seconds: float = setting(120.0, range=ranges.SECONDS, resume=SAFE)
    """Time for the ranks to save and to end once asked to stop; then they are killed."""
    # launcher=torchrun
    node_rank: int | None = setting(None, range=ranges.NODE_RANK, resume=SAFE)
    """Rank of this machine in `nodes`; None = 0 on one machine, else NODE_RANK or GROUP_RANK from the environment."""
    rendezvous: Rendezvous = setting(Rendezvous.static, resume=SAFE)
    """How the nodes of torchrun meet."""
    rendezvous_id: str | None = setting(None, text=texts.line, resume=SAFE)
    """Distinguishes c10d jobs with the same endpoint; None = derived from the run folder."""
    # launcher=deepspeed
    hostfile: str | None = setting(None, text=texts.path, resume=SAFE)
    """File with lines `host slots=N`: deepspeed starts the ranks of all hosts from here. None = this machine only."""
    # launcher=slurm; put settings that all users of a site share into a preset, conf/launcher/NAME.yaml
    time: str | None = setting(None, text=texts.free, resume=SAFE)  # checked by `time_is_slurms`
    """Time limit of a job, such as 24:00:00 or 2-12:00:00; None = the partition's."""
    partition: str | None = setting(
        None, text=texts.free, resume=SAFE
    )  # checked by `batch_options_are_lines`, as the next three
    """Slurm partition; None = the default of the cluster."""
    account: str | None = setting(None, text=texts.free, resume=SAFE)
    """Slurm account to charge; None = your default."""
    qos: str | None = setting(None, text=texts.free, resume=SAFE)
    """Slurm quality of service; None = the default of your account."""
    job_name: str | None = setting(None, text=texts.free, resume=SAFE)
    """Name of the Slurm job; None = the run folder's name."""
    chain: int = setting(1, range=ranges.JOBS, resume=SAFE)
    """Jobs to submit at once, each starting when the one before it ends, for runs beyond the time limit."""
    max_requeues: int = setting(20, range=ranges.REQUEUES, resume=SAFE)
    """How often a job may requeue itself."""
    max_stalled_requeues: int = setting(2, range=ranges.REQUEUES, resume=SAFE)
    """How often in a row it may do so without a newer checkpoint."""
    modules: list[str] = setting([], text=texts.line, resume=SAFE)
    """Environment modules to load on every node."""
    setup: list[str] = setting([], text=texts.free, resume=SAFE)
    """Shell lines that the batch script runs before srun, such as `source /apps/env.sh`."""
    environment: dict[str, str] = setting({}, text=texts.free, resume=SAFE)
    """Variables of every rank, with their values; no secrets, since they are stored in the run folder."""
    pass_environment: list[str] = setting([], text=texts.free, resume=SAFE)  # checked by `passed_variables_have_names`
    """Names of variables that every rank gets from the launching shell. No file has their values: for API keys."""
    container: str | None = setting(None, text=texts.path, resume=SAFE)
    """Image for srun's --container-image (pyxis)."""
    container_mounts: list[str] = setting([], text=texts.free, resume=SAFE)  # checked by `mounts_are_pairs`
    """Mounts for srun's --container-mounts: `/host/folder:/container/folder`."""
    sbatch_options: list[str] = setting([], text=texts.free, resume=SAFE)  # checked by `batch_options_are_lines`
    """Further `#SBATCH` options, such as `--constraint=h100`."""
    srun_arguments: list[str] = setting([], text=texts.free, resume=SAFE)
    """Further arguments of srun."""
