"""`python -m launch verify`: starts the ranks of a run to verify their layout instead of training."""

from __future__ import annotations

from dataclasses import replace

from launch.local import LocalLauncher
from megatron_lite.config.derived import given_processes
from megatron_lite.config.launcher import LauncherConfig
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import RunConfig

FOLDER_SUFFIX = "-verify"


def in_own_folder(config: ResolvedConfig) -> ResolvedConfig:
    """The configuration with a folder next to that of the run, which a verification must not change."""
    return replace(config, train=replace(config.train, run_dir=config.train.run_dir + FOLDER_SUFFIX))


def on_this_machine(config: RunConfig) -> RunConfig:
    """The same layout with the local launcher, ignoring the run's own launcher, nodes and hosts."""
    local = LauncherConfig(
        num_processes=given_processes(config),
        threads_per_process=config.launcher.threads_per_process,
        device=config.launcher.device,
        grace_seconds=config.launcher.grace_seconds,
    )
    return replace(config, launcher=local)


def _no_data(config: ResolvedConfig) -> None:
    """Verification generates its samples itself."""


LAUNCHER = LocalLauncher(warm_modules=("torch", "torch._dynamo", "megatron_lite.verify.layout_check"), prepare=_no_data)
