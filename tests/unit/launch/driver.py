"""Runs a launcher on the stub script: `python -m tests.unit.launch.driver LAUNCHER RUN_DIR [SETTING ...]`."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from launch.base import Launcher
from launch.deepspeed import DeepSpeedLauncher
from launch.local import LocalLauncher
from launch.torchrun import TorchrunLauncher
from megatron_lite.config.compose import compose
from megatron_lite.config.derived import resolve
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import DataError

STUB = Path(__file__).with_name("stub.py")


def prepare(config: RunConfig) -> Path:
    if os.environ.get("STUB") == "bad data":
        raise DataError("corpus.txt is empty; give a file with text")
    return Path("data")  # the stub reads none


def build(name: str) -> Launcher:
    if name == "deepspeed":
        return DeepSpeedLauncher(prepare)
    if name == "torchrun":
        return TorchrunLauncher(prepare)
    return LocalLauncher(fork=name == "fork", warm_modules=("json",), prepare=prepare)


def main(name: str, run_dir: str, words: list[str]) -> int:
    # A test session that a shell put into the background hands its ignored SIGINT down to us.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config = resolve(compose("pretrain_gpt", [f"train.run_dir={run_dir}", *words]), device="cpu")
    launcher = build(name)
    plan = launcher.plan(config)
    argv = tuple(str(STUB) if word.endswith("pretrain_gpt.py") else word for word in plan.argv)
    return launcher.run(replace(plan, argv=argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
