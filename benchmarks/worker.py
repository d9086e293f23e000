"""A process that keeps one system ready and trains a few steps on request.

All systems of a comparison are ready at once and take turns, A B C A B C, so that a machine that slows down slows all
of them. Only one works at a time; the others sleep on their stdin.

`python -m benchmarks.worker SYSTEM PRECISION VOCAB` prints one JSON object a line: first `{"ready": true}`, then for
each number of steps that it reads, the cost of one of them, and for the word `peak` the speed of a matrix product.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Cost:
    """Cost of one step, the mean over a turn."""

    cpu_seconds: float  # of all threads of the process
    wall_seconds: float
    loss: float


class Worker:
    """The parent's handle of a worker process; a context manager that ends it."""

    def __init__(self, system: str, precision: str, vocab_size: int) -> None:
        self.name = system
        command = [sys.executable, "-m", "benchmarks.worker", system, precision, str(vocab_size)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=worker_environment(),
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def wait_until_ready(self) -> None:
        self._read()

    def run(self, steps: int) -> Cost:
        return Cost(**self._ask(str(steps)))

    def gemm_peak(self) -> float:
        """FLOP/s of one thread in the worker's precision, under the settings that our systems run with."""
        return self._ask("peak")["flops_per_second"]

    def _ask(self, question: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{question}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            assert self._process.stderr is not None
            raise RuntimeError(f"the {self.name} worker died:\n{self._process.stderr.read()[-3000:]}")
        return json.loads(line)


def worker_environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONWARNINGS": "ignore",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
    }


def main(system: str, precision: str, vocab_size: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print to stdout; the answers must stay alone there
    import torch

    from benchmarks.shape import Shape
    from benchmarks.systems import SYSTEMS
    from megatron_lite.config.schema import Precision
    from megatron_lite.observe.hardware import measure_gemm_peak

    torch.set_num_threads(1)
    step = SYSTEMS[system](Shape(int(vocab_size), Precision(precision)))
    for _ in range(WARM_UP_STEPS):
        step()
    answers.write('{"ready": true}\n')
    for line in sys.stdin:
        if line.strip() == "peak":
            peak = measure_gemm_peak(torch.bfloat16 if precision == "bf16" else torch.float32)
            answers.write(json.dumps({"flops_per_second": peak}) + "\n")
            continue
        steps = int(line)
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(steps):
            loss = step()
        cost = Cost((time.process_time() - cpu) / steps, (time.perf_counter() - wall) / steps, loss)
        answers.write(json.dumps(vars(cost)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
