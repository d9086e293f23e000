"""The environment that every rank needs, whatever starts it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import ConfigError, LaunchError
from megatron_lite.observe.markers import ERROR_FILE as ERROR_FILE  # every launcher sets it, any rank may fill it

COUNTS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_NUM_TASKS", "MASTER_PORT")
QUIET = (FutureWarning, UserWarning)  # of libraries about their own future: nothing that a user could fix


def rank_environment(config: RunConfig, *, one_machine: bool) -> dict[str, str]:
    """Variables that all ranks share.

    Args:
        config: resolved, so that its device is `cpu` or `cuda`.
        one_machine: all ranks run here.
    """
    threads = str(config.launcher.threads_per_process)
    environment = {
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,  # read at numpy's import, which else starts a thread per core
        "TOKENIZERS_PARALLELISM": "false",  # its threads would be lost in a fork
        "PYTHONWARNINGS": ",".join(f"ignore::{category.__name__}" for category in QUIET),
        "DS_ACCELERATOR": config.launcher.device,  # else DeepSpeed asks CUDA, which a fork could not use then
    }
    if config.launcher.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # counts GPUs without opening them
    if one_machine and Path("/sys/class/net/lo").exists():
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo looks the host's name up, which laptops cannot resolve
        if config.launcher.device != "cpu":
            environment["NCCL_SOCKET_IFNAME"] = "lo"  # for its bootstrap: nobody else has to reach it
    return environment


def passed_environment(config: RunConfig) -> dict[str, str]:
    """The variables that the ranks get from this process by name, with the values that they have here: for no file.

    Raises:
        ConfigError: one is not set here.
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
    """Set the variables in this process; PYTHONWARNINGS, which Python reads only at its start, takes effect as well."""
    for name, value in environment.items():
        if overwrite or name not in os.environ:
            os.environ[name] = value
    for category in QUIET:
        warnings.filterwarnings("ignore", category=category)


def use_own_extensions_folder(run_dir: Path) -> None:
    """Let torch build extensions, should one ever be needed, in a folder that no earlier process has touched.

    The shared default keeps the lock of a process that was killed while it built, and later ones wait for it for ever.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(run_dir.absolute() / "torch_extensions" / str(os.getppid())))


def is_count(value: str) -> bool:
    """Whether a variable holds a number from 0 to 999999999."""
    return value.isascii() and value.isdigit() and len(value) < 10


def require_numbers(environment: Mapping[str, str]) -> None:
    """Check the variables by which torchrun, deepspeed and srun number the processes.

    Raises:
        LaunchError: with every one that is not a number.
    """
    given = {name: environment[name] for name in COUNTS if name in environment}
    wrong = [f"{name}={value!r}" for name, value in given.items() if not is_count(value)]
    if wrong:
        raise LaunchError(
            f"{', '.join(wrong)} in the environment must be whole numbers, as torchrun, deepspeed or srun set them; "
            "unset what does not come from one of these"
        )
