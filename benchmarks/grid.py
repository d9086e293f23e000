"""DP2 x TP2 x PP2 on eight ranks of this machine: the cost of a step over all of them.

`python -m benchmarks.grid PRECISION VOCAB TURNS STEPS` prints one JSON list with the cost of a step for each turn.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from benchmarks.ranks import build_rank, run_job
from benchmarks.shape import MICRO_BATCH, SEED, SEQ_LENGTH, Shape

SIZE = 2  # of each axis
MICRO_BATCHES = 4  # of each data-parallel rank
GLOBAL_BATCH = MICRO_BATCH * MICRO_BATCHES * SIZE
TOKENS = GLOBAL_BATCH * SEQ_LENGTH
WARM_UP_STEPS = 2


def main(precision: str, vocab_size: str, turns: str, steps: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    answers.write(run_job(SIZE**3, _rank, precision, int(vocab_size), int(turns), int(steps)) + "\n")


def _rank(rank: int, folder: Path, precision: str, vocab_size: int, turns: int, steps: int) -> None:
    import torch
    import torch.distributed as dist

    from megatron_lite.config.schema import Precision
    from megatron_lite.optim.batch_ramp import BatchStep
    from megatron_lite.parallel.topology import Topology

    shape = Shape(vocab_size, Precision(precision))
    engine = build_rank(rank, folder, Topology(SIZE, SIZE, SIZE), shape, GLOBAL_BATCH)
    first = SEED + engine.context.data_rank * MICRO_BATCHES
    batches = [shape.batch(first + index) for index in range(MICRO_BATCHES)]

    def turn(num_steps: int) -> dict[str, float]:
        dist.barrier()
        before, wall = os.times(), time.perf_counter()
        for _ in range(num_steps):
            loss = engine.train_step(batches, BatchStep(0, GLOBAL_BATCH), 3e-4).loss
        dist.barrier()
        wall = time.perf_counter() - wall
        after = os.times()
        total = torch.tensor([after.user - before.user, after.system - before.system], dtype=torch.float64)
        dist.all_reduce(total)
        user, kernel = (total / num_steps).tolist()
        return {
            "cpu_seconds": user + kernel,
            "kernel_seconds": kernel,
            "wall_seconds": wall / num_steps,
            "loss": loss,
        }

    turn(WARM_UP_STEPS)
    results = [turn(steps) for _ in range(turns)]
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
