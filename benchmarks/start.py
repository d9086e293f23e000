"""From the command to the end of the demo's first step on eight local ranks, with the data ready."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from megatron_lite.observe.metrics import METRICS_FILE

POLL_SECONDS = 0.02
LIMIT_SECONDS = 300.0


def seconds_to_first_step(folder: Path, cache_dir: Path) -> float:
    """Launch the demo with one step in a fresh folder and wait for that step's line in metrics.jsonl.

    The first call also prepares the data in `cache_dir`: leave it out of the figures.

    Raises:
        RuntimeError: the run failed or took more than five minutes.
    """
    command = [
        sys.executable,
        *("-m", "launch", "pretrain_gpt", "experiment=demo", "train.steps=1", "optimizer.warmup_steps=0"),
        *("train.eval_batches=1", "train.generate_tokens=0", "tracking.plot=false", "launcher.device=cpu"),
        *(f"data.cache_dir={cache_dir}", f"train.run_dir={folder}"),
    ]
    output = folder.with_suffix(".log")
    start = time.perf_counter()
    with output.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            return _wait_for_line(process, folder / METRICS_FILE, start)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{output.read_text()[-3000:]}") from None
        finally:
            _let_end(process)


def _wait_for_line(process: subprocess.Popen[bytes], metrics: Path, start: float) -> float:
    while time.perf_counter() - start < LIMIT_SECONDS:
        if metrics.exists() and metrics.read_bytes().endswith(b"\n"):
            return time.perf_counter() - start
        if process.poll() is not None and not metrics.exists():
            raise RuntimeError(f"the launched run ended with code {process.returncode} before its first step")
        time.sleep(POLL_SECONDS)
    raise RuntimeError("the launched run made no step")


def _let_end(process: subprocess.Popen[bytes]) -> None:
    """Its validation and checkpoint are not measured, but must not run beside the next measurement."""
    try:
        process.wait(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
