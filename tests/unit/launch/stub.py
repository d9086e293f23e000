"""A script in place of a real one: it imports no torch and does what STUB says, in the rank that STUB_RANK names."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from launch.entry import run_script
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import ConfigError, RunEnd
from megatron_lite.observe.markers import STOP_FILE, leave_marker
from megatron_lite.observe.run_lock import Claim

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
         "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR")  # fmt: skip


def body(config: RunConfig, claim: Claim) -> RunEnd | None:
    rank, what = int(os.environ["RANK"]), os.environ.get("STUB", "report")
    folder = Path(str(config.train.run_dir))
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    if what == "report":
        (folder / f"env-{rank}").write_text("\n".join(os.environ[name] for name in NAMES))
        return None
    if what == "stop when asked":
        return stop_when_asked(folder, rank)
    if os.environ.get("STUB_RANK", str(rank)) != str(rank):
        time.sleep(600)
    if what == "user error":
        raise ConfigError(["train.steps=3 is bad; use 4", "train.seed=1 is bad; use 2"])
    if what == "exception":
        (folder / "logs" / f"rank-{rank}.log").write_text("an earlier line\n")
        raise ValueError("the layer is broken")
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
    return None


def stop_when_asked(folder: Path, rank: int) -> RunEnd:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while not (folder / STOP_FILE).exists():
        time.sleep(0.02)
    time.sleep(0.2)
    (folder / f"saved-{rank}").touch()
    if rank == 0:
        leave_marker(folder, RunEnd.PREEMPTED, "asked", 3)
    return RunEnd.PREEMPTED


def main(argv: list[str] | None = None) -> int:
    return run_script(body, "pretrain_gpt", argv)


if __name__ == "__main__":
    sys.exit(main())
