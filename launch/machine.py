"""The resources of this machine, found without importing torch."""

from __future__ import annotations

import ast
import importlib.util
import os
import secrets
import socket
from pathlib import Path

from megatron_lite.config.derived import given_processes, ranks_per_replica
from megatron_lite.config.launcher import LauncherConfig, LauncherName
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import LaunchError

# Below the ephemeral ports, so that no outgoing connection takes a port between choice and use.
PORTS = range(20000, 32000)
PORT_ATTEMPTS = 100
PROCESSES_PER_CORE = 16  # ranks on CPUs are for trying out layouts, so many may share a core
DEVICES = Path("/dev")


def visible_gpus() -> int:
    """Number of CUDA devices that torch would see: 0 for a CPU build of torch, or if CUDA_VISIBLE_DEVICES hides all."""
    if not _torch_has_cuda():
        return 0
    present = len(list(DEVICES.glob("nvidia[0-9]*")))
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return present
    names = []
    for name in chosen.split(","):
        if not name.strip() or name.strip() == "-1":
            break  # CUDA ignores everything after the first invalid name
        names.append(name)
    return min(present, len(names))


def _torch_has_cuda() -> bool:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise LaunchError("torch is not installed; run `make install`, or `pip install torch`")
    return built_with_cuda(Path(spec.origin).with_name("version.py"))


def built_with_cuda(version_file: Path) -> bool:
    """Whether torch has CUDA: torch/version.py holds the CUDA version of the build, None for a CPU build."""
    for node in ast.parse(version_file.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id == "cuda":
                return not (isinstance(node.value, ast.Constant) and node.value.value is None)
    return False


def choose_world_size(config: RunConfig, gpus: int) -> int | None:
    """Number of processes where the configuration leaves it open: one per GPU, in whole replicas of the model.

    Returns:
        None if the configuration decides it (sizes or launcher settings), or there are no GPUs.
    """
    open_size = config.parallel.data_parallel_size is None and given_processes(config) is None
    replica = ranks_per_replica(config)
    if not open_size or config.launcher.device == "cpu" or gpus < replica:
        return None
    return gpus // replica * replica


def choose_device(setting: str, num_processes: int, gpus: int) -> str:
    """`cuda` if each process of this machine gets its own GPU, else `cpu`.

    Raises:
        LaunchError: launcher.device=cuda with too few GPUs.
    """
    if setting == "cuda" and gpus < num_processes:
        raise LaunchError(
            f"launcher.device=cuda needs {num_processes} GPUs, one per process, and this machine shows {gpus}; "
            f"use a layout of {gpus} processes or launcher.device=cpu"
            if gpus
            else "launcher.device=cuda needs a GPU for each process and torch sees none here; use launcher.device=cpu"
        )
    if setting == "auto":
        return "cuda" if gpus >= num_processes else "cpu"
    return setting


def device_of_nodes(launcher: LauncherConfig) -> str:
    """The device of ranks on other machines, which cannot be inspected from here.

    Returns:
        launcher.device; for `auto`: `cuda` if launcher.gpus_per_node says that there are GPUs, and `cpu` in a Slurm
        job, which gets only the GPUs that it requests.
    """
    if launcher.device != "auto":
        return launcher.device
    return "cuda" if launcher.gpus_per_node else "cpu" if launcher.name is LauncherName.slurm else "auto"


def require_capacity(num_processes: int, device: str) -> None:
    """Refuse to run a cluster's layout on one machine without GPUs, which would only exhaust its memory.

    Raises:
        LaunchError: far more processes on the CPU than its cores can serve.
    """
    cores = os.cpu_count() or 1
    limit = cores * PROCESSES_PER_CORE
    if device == "cpu" and num_processes > limit:
        raise LaunchError(
            f"the layout needs {num_processes} processes, and this machine has no {num_processes} GPUs and only "
            f"{cores} CPU cores; use a layout of at most {limit} processes, or --dry-run to see the plan"
        )


def free_port(address: str) -> int:
    """A port on which nothing listens."""
    for _ in range(PORT_ATTEMPTS):
        port = PORTS[secrets.randbelow(len(PORTS))]
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise LaunchError(f"no free port among {PORT_ATTEMPTS} tried on {address}; give launcher.master_port")
