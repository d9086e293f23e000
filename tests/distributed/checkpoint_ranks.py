"""What the ranks of the checkpoint tests run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_lite.checkpoint.fragments import WEIGHT
from megatron_lite.checkpoint.loading import load, newest_complete
from megatron_lite.checkpoint.plan import Plan, shapes_of_all_ranks
from megatron_lite.checkpoint.retention import Kept
from megatron_lite.checkpoint.saving import Saver
from megatron_lite.checkpoint.state import CheckpointState, Layout, OptimizerState
from megatron_lite.config.schema import RunConfig
from megatron_lite.optim.moments import moments_of
from megatron_lite.train.engine import Engine
from tests.distributed.layout_ranks import synthetic_engine, train_steps

KEEP_ALL = Kept(keep_last=0, keep_every=0, keep_best=0)


@dataclass
class Link:
    """One run of a chain: what it found, and what it left."""

    loaded_step: int
    losses: list[float]
    """Of the steps up to the checkpoint that it left, and of as many after it."""


def link_rank(config: RunConfig, vocab_size: int, folder: Path, copy: Path, num_steps: int, mutation: Any) -> Link:
    """Resume `folder`'s checkpoint if there is one, save it again in `copy`, train, save in `folder`, train on."""
    engine, batches_from = synthetic_engine(config, vocab_size)
    plan = Plan.of(shapes_of_all_ranks(engine.shards.shapes()), None, largest_bytes=20_000)
    first = resume(engine, plan, folder)
    if first:
        save(engine, plan, copy, first, asynchronous=True)
    losses = train_steps(engine, batches_from, config, first, num_steps)
    save(engine, plan, folder, first + num_steps, asynchronous=False)
    losses += train_steps(engine, batches_from, config, first + num_steps, num_steps)
    return Link(first, losses)


def resume(engine: Engine, plan: Plan, folder: Path) -> int:
    """The step of the checkpoint that was loaded, 0 without one."""
    found = newest_complete(folder, print)
    if found is None:
        return 0
    path, state = found
    engine.shards.prepare()
    load(path, plan, engine.shards.fragments(), (WEIGHT, *state.optimizer.moments))
    engine.shards.updates = state.optimizer.step
    if state.loss_scale is not None:
        engine.shards.loss_scale = state.loss_scale
    engine.shards.weights_changed()
    return state.step


def save(engine: Engine, plan: Plan, folder: Path, step: int, *, asynchronous: bool) -> None:
    saver = Saver(folder, plan, {}, KEEP_ALL, asynchronous=asynchronous)
    saver.save(engine.shards.fragments(), state_of(engine, step))
    saver.wait()
    dist.barrier()


def state_of(engine: Engine, step: int) -> CheckpointState:
    config, topology = engine.config, engine.context.topology
    return CheckpointState(
        step=step,
        samples=step * config.train.global_batch_size,
        layout=Layout(
            topology.data_parallel_size,
            topology.tensor_parallel_size,
            topology.pipeline_parallel_size,
            config.parallel.zero_stage,
            config.parallel.sequence_parallel,
        ),
        precision=str(config.train.precision),
        optimizer=OptimizerState(str(config.optimizer.name), engine.shards.updates, moments_of(config.optimizer)),
        loss_scale=engine.shards.loss_scale,
        data_fingerprint="synthetic",
        hugging_face=False,
        validation_loss=None,
        config={"train": asdict(config.train)["steps"]},
    )
