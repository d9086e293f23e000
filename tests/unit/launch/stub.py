"""A script in place of a real one: it imports no torch and does what STUB says, in the rank that STUB_RANK names."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from launch.entry import run_script
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import ConfigError

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS",
         "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR")  # fmt: skip


def body(config: RunConfig) -> None:
    rank, what = int(os.environ["RANK"]), os.environ.get("STUB", "report")
    folder = Path(str(config.train.run_dir))
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    if what == "report":
        (folder / f"env-{rank}").write_text("\n".join(os.environ[name] for name in NAMES))
        return
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


def main(argv: list[str] | None = None) -> int:
    return run_script(body, "pretrain_gpt", argv)


if __name__ == "__main__":
    sys.exit(main())
