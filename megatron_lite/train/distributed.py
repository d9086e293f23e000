"""Set up one process of the job: its device, its process groups, its timeouts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.errors import LaunchError, library_edge
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.stores import tcp_store
from megatron_lite.train.startup import require_same_program

COLLECTIVES_TIMEOUT = 1.5  # x train.timeout_seconds
NOT_MET = (
    "the logs of the other ranks show whether they have started; if they have, give an address that every node can "
    "reach in launcher.master_address and a free port in launcher.master_port, or raise train.timeout_seconds"
)


@dataclass(frozen=True)
class ProcessEnvironment:
    """What a launcher passes to each process in environment variables (the torchrun convention)."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @classmethod
    def read(cls) -> ProcessEnvironment:
        """Read the environment variables; a script started by hand has a world size of 1."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            world_size=world_size,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size))),
        )


def own_device(setting: str, environment: ProcessEnvironment) -> torch.device:
    """The device of this rank: the CPU, or the GPU whose index is its local rank.

    Args:
        setting: launcher.device, resolved: `cpu` or `cuda`.
    Raises:
        LaunchError: torch sees fewer GPUs than this node has ranks.
    """
    if setting == "cpu":
        return torch.device("cpu")
    if torch.cuda.device_count() < environment.local_world_size:
        raise LaunchError(
            f"launcher.device=cuda needs {environment.local_world_size} GPUs on this node, "
            f"but torch sees {torch.cuda.device_count()}; start fewer processes or use launcher.device=cpu"
        )
    torch.cuda.set_device(environment.local_rank)
    return torch.device("cuda", environment.local_rank)


def choose_algorithms(device: torch.device, *, deterministic: bool) -> None:
    """For `train.deterministic`: restrict torch to deterministic algorithms on a GPU; an operation without one raises.

    A CPU needs no restriction.
    """
    if deterministic and device.type == "cuda":
        # cuBLAS reads this when it starts, and torch refuses without it. Launchers set it; a script may be run alone.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # only for finding bugs; it fills every new tensor
        torch.backends.cudnn.benchmark = False


def start_process_group(device: torch.device, environment: ProcessEnvironment, timeout_seconds: float) -> None:
    """Join the job's default process group, and set the timeout of every later group.

    Args:
        timeout_seconds: train.timeout_seconds, after which the watchdog names the rank that hangs. Collectives time out
            at 1.5 times that: their error would not name the cause.
    Raises:
        LaunchError: not all ranks joined within that time.
    """
    timeout = timedelta(seconds=COLLECTIVES_TIMEOUT * timeout_seconds)
    # Groups that are created without a timeout, as DeepSpeed does, take these defaults of 30 and 10 minutes.
    dist.distributed_c10d.default_pg_timeout = timeout
    dist.distributed_c10d.default_pg_nccl_timeout = timeout
    if dist.is_initialized():  # a test's harness has done it
        return
    # DeepSpeed requires these variables even for one process.
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    backend = "nccl" if device.type == "cuda" else "gloo"
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    what = (
        f"rank {environment.rank} could not connect to the other {environment.world_size - 1} ranks at "
        f"{address}:{port} within {timeout.total_seconds():g} s = {COLLECTIVES_TIMEOUT} x train.timeout_seconds"
    )
    with library_edge(LaunchError, what, NOT_MET):
        if address and port and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            # torch's env:// rendezvous would listen on all addresses of this machine.
            rank, world_size = environment.rank, environment.world_size
            store = tcp_store(address, int(port), world_size, rank == 0, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        elif address:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def join(
    config: ResolvedConfig, device: torch.device, environment: ProcessEnvironment
) -> tuple[ParallelContext, list[str]]:
    """Connect to the other ranks and build this rank's place in the layout.

    Returns:
        this rank's context, and the node of each rank
    Raises:
        LaunchError: not all ranks joined, or not all run the same program. (Whether the world size fits the layout was
            validated with the configuration.)
    """
    start_process_group(device, environment, config.train.timeout_seconds)
    nodes = require_same_program(config, device, environment.local_rank)
    context = ParallelContext.build(
        config.topology, device=device, sequence_parallel=config.parallel.sequence_parallel, seed=config.train.seed
    )
    return context, nodes


def leave() -> None:
    """Shut down cleanly: the barrier keeps every rank from closing its connections while another still needs them."""
    dist.barrier()
    dist.destroy_process_group()
