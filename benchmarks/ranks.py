"""Jobs of forked gloo ranks on this machine."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.shape import SEED, Shape

if TYPE_CHECKING:
    from megatron_lite.engine.engine import Engine
    from megatron_lite.engine.hooks import EngineHooks
    from megatron_lite.parallel.topology import Topology


def run_job(world_size: int, target: Callable[..., None], *arguments: Any) -> str:
    """Call target(rank, folder, *arguments) in each rank; returns what one of them wrote to folder/result.json."""
    # Imported before the fork, so that eight ranks do not import it eight times.
    for name in ("torch._dynamo", "megatron_lite.engine.engine", "megatron_lite.train.checkpoints"):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        context = multiprocessing.get_context("fork")
        ranks = [
            context.Process(target=target, args=(rank, Path(name), *arguments), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        while any(process.is_alive() for process in ranks):
            failed = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
            if failed:
                for process in ranks:
                    process.kill()
                sys.exit(f"rank {failed[0]} of {world_size} failed")
            time.sleep(0.1)
        return (Path(name) / "result.json").read_text()


def build_rank(
    rank: int,
    folder: Path,
    layout: Topology,
    shape: Shape,
    global_batch_size: int,
    hooks: EngineHooks | None = None,
    stages: str = "balanced",
) -> Engine:
    """Meet the other ranks of the job, and build the benchmark's model under ZeRO-1.

    Args:
        stages: parallel.stages.
    """
    import torch
    import torch.distributed as dist

    from megatron_lite.config.schema import ParallelConfig
    from megatron_lite.engine.build import build_engine
    from megatron_lite.engine.task import build_task
    from megatron_lite.observe.hardware import enable_fast_float32_matmul, reuse_freed_memory
    from megatron_lite.parallel.context import ParallelContext

    torch.set_num_threads(1)
    world = str(layout.world_size)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    reuse_freed_memory()
    enable_fast_float32_matmul()
    store = dist.FileStore(str(folder / "store"), layout.world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=layout.world_size)
    context = ParallelContext.build(layout, device=torch.device("cpu"), sequence_parallel=False, seed=SEED)
    parallel = ParallelConfig(
        tensor_parallel_size=layout.tensor_parallel_size,
        pipeline_parallel_size=layout.pipeline_parallel_size,
        data_parallel_size=layout.data_parallel_size,
        zero_stage=1,
        stages=stages,
    )
    config = shape.run(parallel, global_batch_size)
    task = build_task(config, context, shape.vocabulary)
    return build_engine(config, context, task, global_batch_size=global_batch_size, hooks=hooks)
