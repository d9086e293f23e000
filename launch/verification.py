"""`python -m launch verify`: the ranks of a run, started to certify their layout instead of training."""

from __future__ import annotations

from dataclasses import replace

from launch.local import LocalLauncher
from megatron_lite.config.launcher import LauncherName
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import ConfigError

FOLDER_SUFFIX = "-verify"


def in_own_folder(config: RunConfig) -> RunConfig:
    """The configuration with a run folder beside that of the run, which a verification must not touch.

    Raises:
        ConfigError: it is to run elsewhere.
    """
    if config.launcher.name is LauncherName.slurm:
        raise ConfigError(
            "launcher.name=slurm submits jobs, and `python -m launch verify` runs on this machine; leave it out"
        )
    assert config.train.run_dir is not None
    return replace(config, train=replace(config.train, run_dir=config.train.run_dir + FOLDER_SUFFIX))


def _no_data(config: RunConfig) -> None:
    """Verification draws its samples itself."""


LAUNCHER = LocalLauncher(warm_modules=("torch", "torch._dynamo", "megatron_lite.train.certificate"), prepare=_no_data)
