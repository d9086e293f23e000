"""The environment variables of every rank, for all launchers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import ConfigError, LaunchError
from megatron_lite.observe.markers import ERROR_FILE as ERROR_FILE  # set by launchers; any rank may write it

COUNTS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_NUM_TASKS", "MASTER_PORT")
QUIET = (FutureWarning, UserWarning)  # libraries' warnings about their own future changes: a user cannot fix them
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the name of torch 2.9 and later, the older one
PRIORITY = "TORCH_NCCL_HIGH_PRIORITY"


def rank_environment(config: RunConfig, *, one_machine: bool) -> dict[str, str]:
    """Variables that all ranks share.

    Args:
        config: resolved, so its device is `cpu` or `cuda`.
        one_machine: all ranks run here.
    """
    threads = str(config.launcher.threads_per_process)
    environment = {
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,  # read when numpy is imported, which otherwise starts a thread per core
        "TOKENIZERS_PARALLELISM": "false",  # its threads would not survive a fork
        "PYTHONWARNINGS": ",".join(f"ignore::{category.__name__}" for category in QUIET),
        "DS_ACCELERATOR": config.launcher.device,  # otherwise DeepSpeed initialises CUDA, which breaks forked ranks
    }
    if config.launcher.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # counts GPUs without opening them
        environment |= _memory_and_streams()
        if config.train.deterministic:
            environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when cuBLAS starts
    if one_machine and Path("/sys/class/net/lo").exists():
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # otherwise gloo resolves the host's name, which fails on some laptops
        if config.launcher.device != "cpu":
            environment["NCCL_SOCKET_IFNAME"] = "lo"  # for its bootstrap: no other machine connects
    return environment


def _memory_and_streams() -> dict[str, str]:
    """What lets a GPU hold and do more; a value that the user has set wins."""
    chosen = {}
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        chosen[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"  # less fragmentation
    if PRIORITY not in os.environ:
        chosen[PRIORITY] = "1"  # collectives start while a matrix product runs
    return chosen


def passed_environment(config: RunConfig) -> dict[str, str]:
    """Variables that ranks get from this process by name, with their current values; never written to a file.

    Raises:
        ConfigError: a variable is not set here.
    """
    names = config.launcher.pass_environment
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigError(
            [
                f"launcher.pass_environment names {name}, and there is no such variable in the environment; "
                f"`export {name}=...` in the shell that launches, or leave it out"
                for name in missing
            ]
        )
    return {name: os.environ[name] for name in names}


def apply(environment: Mapping[str, str], *, overwrite: bool) -> None:
    """Set the variables in this process; applies PYTHONWARNINGS too, which Python itself reads only at its start."""
    for name, value in environment.items():
        if overwrite or name not in os.environ:
            os.environ[name] = value
    for category in QUIET:
        warnings.filterwarnings("ignore", category=category)


def use_own_extensions_folder(run_dir: Path) -> None:
    """Make torch build extensions, if it ever needs to, in a folder that no earlier process has used.

    In the shared default folder, the lock of a process killed during a build stays, and later processes wait forever.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(run_dir.absolute() / "torch_extensions" / str(os.getppid())))


def is_count(value: str) -> bool:
    """Whether a variable's value is a number from 0 to 999999999."""
    return value.isascii() and value.isdigit() and len(value) < 10


def require_numbers(environment: Mapping[str, str]) -> None:
    """Check the variables with which torchrun, deepspeed and srun number the processes.

    Raises:
        LaunchError: lists every variable that is not a number.
    """
    given = {name: environment[name] for name in COUNTS if name in environment}
    wrong = [f"{name}={value!r}" for name, value in given.items() if not is_count(value)]
    if wrong:
        raise LaunchError(
            f"{', '.join(wrong)} in the environment must be whole numbers, as torchrun, deepspeed or srun set them; "
            "unset what does not come from one of these"
        )
