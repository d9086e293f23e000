"""The launchers by name. A new one needs a class with `plan` and `run`, a line here, and a member of LauncherName."""

from __future__ import annotations

from launch.base import Launcher
from launch.deepspeed import DeepSpeedLauncher
from launch.local import LocalLauncher
from launch.slurm.launcher import SlurmLauncher
from launch.torchrun import TorchrunLauncher
from megatron_lite.config.launcher import LauncherName

LAUNCHERS: dict[LauncherName, type[Launcher]] = {
    LauncherName.local: LocalLauncher,
    LauncherName.torchrun: TorchrunLauncher,
    LauncherName.deepspeed: DeepSpeedLauncher,
    LauncherName.slurm: SlurmLauncher,
}
