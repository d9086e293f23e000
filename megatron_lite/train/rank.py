"""The setup that every rank needs, whatever it does afterwards: its output, its watchdog, its data and its device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.data import FOLDER_VARIABLE
from megatron_lite.data.shards.prepare import prepared_folder
from megatron_lite.data.shards.prepared import PreparedData, load_prepared
from megatron_lite.modes import keep_private
from megatron_lite.observe.console import Console, redirect_output
from megatron_lite.observe.hardware import enable_fast_float32_matmul
from megatron_lite.observe.heartbeat import Heartbeat
from megatron_lite.observe.run_lock import Claim
from megatron_lite.train.distributed import ProcessEnvironment, choose_algorithms, own_device
from megatron_lite.train.hang.watchdog import watchdog_of
from megatron_lite.train.out_of_memory import faults_explained
from megatron_lite.train.stopping import StopRequest


@dataclass(frozen=True)
class Rank:
    """What a rank has before it connects to the others."""

    folder: Path
    """train.run_dir."""
    environment: ProcessEnvironment
    console: Console
    heartbeat: Heartbeat
    request: StopRequest
    prepared: PreparedData
    device: torch.device


@contextmanager
def started_rank(config: ResolvedConfig, claim: Claim) -> Iterator[Rank]:
    """Set up this rank. Until the end of the block it is watched for hangs, handles signals, and explains
    errors of memory, of the GPU and of the machine.

    Raises:
        MegatronLiteError: the data is damaged or missing, or the device does not exist.
    """
    folder = config.run_dir
    environment = ProcessEnvironment.read()
    console = redirect_output(folder, environment.rank)
    heartbeat = Heartbeat()
    watchdog = watchdog_of(config, environment, heartbeat, console, claim)
    request = StopRequest(folder if environment.rank == 0 else None, config.launcher.grace_seconds)
    try:
        with request.listening(), faults_explained(config, environment), watchdog:
            data_folder = os.environ.get(FOLDER_VARIABLE)
            prepared = load_prepared(Path(data_folder) if data_folder else prepared_folder(config), config)
            keep_private(folder, prepared.folder, console.log_path, is_writer=environment.rank == 0)
            device = own_device(config.launcher.device, environment)
            choose_algorithms(device, deterministic=config.train.deterministic)
            print(enable_fast_float32_matmul(device), flush=True)
            yield Rank(folder, environment, console, heartbeat, request, prepared, device)
    finally:
        console.restore()
