"""DP2 x TP2 x PP2 on eight ranks of this machine: what a step costs all of them together.

`python -m benchmarks.grid PRECISION VOCAB TURNS STEPS` prints one JSON list with the cost of a step for each turn.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.shape import MICRO_BATCH, SEED, SEQ_LENGTH, Shape

SIZE = 2  # of each axis
MICRO_BATCHES = 4  # of each data-parallel rank
GLOBAL_BATCH = MICRO_BATCH * MICRO_BATCHES * SIZE
TOKENS = GLOBAL_BATCH * SEQ_LENGTH
WARM_UP_STEPS = 2


def main(precision: str, vocab_size: str, turns: str, steps: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # Imported before the fork, so that eight ranks do not import it eight times.
    for name in ("torch._dynamo", "megatron_lite.train.engine"):
        importlib.import_module(name)

    with tempfile.TemporaryDirectory(prefix="grid-") as name:
        context = multiprocessing.get_context("fork")
        arguments = (Path(name), precision, int(vocab_size), int(turns), int(steps))
        ranks = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(SIZE**3)]
        for process in ranks:
            process.start()
        while any(process.is_alive() for process in ranks):
            failed = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
            if failed:
                for process in ranks:
                    process.kill()
                sys.exit(f"rank {failed[0]} of the 2x2x2 job failed")
            time.sleep(0.1)
        answers.write((Path(name) / "result.json").read_text() + "\n")


def _rank(rank: int, folder: Path, precision: str, vocab_size: int, turns: int, steps: int) -> None:
    import torch
    import torch.distributed as dist

    from megatron_lite.config.schema import ParallelConfig, Precision
    from megatron_lite.observe.hardware import enable_fast_float32_matmul, reuse_freed_memory
    from megatron_lite.optim.batch_ramp import BatchStep
    from megatron_lite.parallel.context import ParallelContext
    from megatron_lite.parallel.topology import Topology
    from megatron_lite.train.engine import build_engine
    from megatron_lite.train.setup import build_task

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(SIZE**3), LOCAL_WORLD_SIZE=str(SIZE**3))
    reuse_freed_memory()
    enable_fast_float32_matmul()
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), SIZE**3), rank=rank, world_size=SIZE**3)
    context = ParallelContext.build(
        Topology(SIZE, SIZE, SIZE), device=torch.device("cpu"), sequence_parallel=False, seed=SEED
    )
    shape = Shape(vocab_size, Precision(precision))
    parallel = ParallelConfig(
        tensor_parallel_size=SIZE, pipeline_parallel_size=SIZE, data_parallel_size=SIZE, zero_stage=1
    )
    config = shape.run(parallel, GLOBAL_BATCH)
    task = build_task(config, context, shape.vocabulary)
    engine = build_engine(config, context, task, global_batch_size=GLOBAL_BATCH)
    batches = [shape.batch(SEED + context.data_rank * MICRO_BATCHES + index) for index in range(MICRO_BATCHES)]

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
