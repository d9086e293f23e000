"""Replaces torchrun and its ranks: `stub_torchrun.py OPTIONS SCRIPT --config FILE`, one process per node, no torch.

It treats the run folder like ranks do: it resumes from the newest checkpoint; on a STOP file or SIGTERM it saves and
writes the marker PREEMPTED; at the end it writes DONE. The variable STUB selects what else it does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from launch.slurm.records import attempts, newest_checkpoint
from megatron_lite.errors import RunEnd
from megatron_lite.observe.markers import HANG_FILE, STOP_FILE, leave_marker

STEP_SECONDS = 0.1
STEPS_OF_LAST_ATTEMPT = 5
SEEN = ("SLURM_NODEID", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES", "STUB", "TEXT")


def main(argv: list[str]) -> int:
    run_dir, node = Path(argv[-1]).parent, os.environ["SLURMD_NODENAME"]
    what, first = os.environ["STUB"], os.environ["SLURM_NODEID"] == "0"
    number = len(attempts(run_dir, "begin"))
    report = {"argv": argv, "environment": {name: os.environ.get(name) for name in SEEN}}
    (run_dir / f"seen-{number}-{node}.json").write_text(json.dumps(report))
    if what == "config error":
        leave_marker(run_dir, RunEnd.CONFIG_ERROR, "data.source=x is empty")
        (run_dir / "logs" / "error.txt").write_text("error: data.source=x is empty\n")
        return 1
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "deaf" and number == 1:
        time.sleep(600)
    if what == "hung" and number == 1:
        time.sleep(0.5)  # until all nodes have started
        (run_dir / HANG_FILE).write_text(json.dumps({"node": "n2"}))
        leave_marker(run_dir, RunEnd.HUNG, "rank 1 (node n2) has been in 'data' for 92 s")
        return 1
    return train(run_dir, until_stopped=what == "stopped once" and number == 1, first=first)


def train(run_dir: Path, *, until_stopped: bool, first: bool) -> int:
    """Args: first: whether this is the node that writes."""
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    step = newest_checkpoint(run_dir) or 0
    last = step + STEPS_OF_LAST_ATTEMPT
    while until_stopped or step < last:
        step += 1
        time.sleep(STEP_SECONDS)
        if asked or (run_dir / STOP_FILE).exists():
            return finish(run_dir, RunEnd.PREEMPTED, step) if first else 1
    return finish(run_dir, RunEnd.DONE, step) if first else 0


def finish(run_dir: Path, end: RunEnd, step: int) -> int:
    (run_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    leave_marker(run_dir, end, "", step)
    return 0 if end is RunEnd.DONE else 1  # torchrun's exit code for all other ends


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
