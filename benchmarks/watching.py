"""The cost of watching a run: steps at DP2 x TP2 x PP2 without it, with it, and ready for a rollback.

`python -m benchmarks.watching VOCAB TURNS` prints one JSON object: for each variant, CPU-seconds of all ranks and wall
seconds of a step, for each turn. The variants take turns on the same engine, A B C A B C. Watching includes the losses
of the sequences at each step, updates, norms and memory of the layers at each interval, the detector, metrics.jsonl,
and wandb's offline record. The norms are measured without it too, because clipping needs their sum.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

from benchmarks.grid import GLOBAL_BATCH, MICRO_BATCHES, SIZE
from benchmarks.ranks import build_rank, run_job
from benchmarks.shape import SEED, Shape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from megatron_lite.config.resolved import ResolvedConfig
    from megatron_lite.data.samples.batch import MicroBatch
    from megatron_lite.data.samples.skips import Skips
    from megatron_lite.engine.engine import Engine
    from megatron_lite.engine.hooks import PendingUpdate
    from megatron_lite.optim.batch_ramp import BatchStep
    from megatron_lite.train.loop import Findings, StepRecord

WAYS = ("bare", "warn", "rollback")
STEPS = 10  # of a turn, the last one with all figures: twice as often as stability.layer_interval asks for
WARM_UP_STEPS = STEPS // 5


class _Switch:
    """The engine's hook before each update. All variants share one engine; without watching it is an empty call."""

    def __init__(self) -> None:
        self.judge: Callable[[PendingUpdate], bool] | None = None

    def __call__(self, update: PendingUpdate) -> bool:
        return self.judge is not None and self.judge(update)


class _Nothing:
    """Held-out samples, of which there are none: nothing is evaluated."""

    def rounds(self) -> Iterator[tuple[list[MicroBatch], int]]:
        return iter(())


class _Batches:
    """The same batch again and again."""

    held_out = _Nothing()

    def __init__(self, own: list[MicroBatch]) -> None:
        from megatron_lite.data.samples.skips import Skips

        self.skips = Skips()
        self._own = own

    def training(self, batch: BatchStep) -> list[MicroBatch]:
        return self._own

    def leave_out(self, skips: Skips) -> None:
        raise NotImplementedError("no turn rolls back")


class _Blind:
    """The observer of a turn without watching."""

    def observe(self, record: StepRecord) -> Findings:
        from megatron_lite.train.loop import Findings

        return Findings(spike=False, ideal_bubble=0.0, shares={})


def main(vocab_size: str, turns: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    answers.write(run_job(SIZE**3, _rank, int(vocab_size), int(turns)) + "\n")


def _rank(rank: int, folder: Path, vocab_size: int, turns: int) -> None:
    import torch.distributed as dist

    from megatron_lite.config.schema import Precision, TrackingConfig, WandbMode
    from megatron_lite.engine.hooks import EngineHooks
    from megatron_lite.observe.trackers import build_trackers
    from megatron_lite.parallel.topology import Topology

    shape = Shape(vocab_size, Precision.fp32)
    switch = _Switch()
    hooks = EngineHooks(before_update=switch)
    engine = build_rank(rank, folder, Topology(SIZE, SIZE, SIZE), shape, GLOBAL_BATCH, hooks)
    first = SEED + engine.context.data_rank * MICRO_BATCHES
    source = _Batches([shape.batch(first + index) for index in range(MICRO_BATCHES)])
    config = replace(engine.config, tracking=TrackingConfig(wandb=WandbMode.offline))
    trackers = build_trackers(config, folder, engine.context.is_writer)
    found: dict[str, dict[str, list[float]]] = {way: {"cpu_seconds": [], "wall_seconds": []} for way in WAYS}
    step = 0
    for turn in range(turns + 1):
        for way in WAYS:
            steps = STEPS if turn else WARM_UP_STEPS
            cost = _turn(engine, switch, config, source, trackers, way, step, steps)
            step += steps
            for name, value in cost.items() if turn else ():
                found[way][name].append(value)
    trackers.finish({})
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _turn(
    engine: Engine,
    switch: _Switch,
    config: ResolvedConfig,
    source: _Batches,
    trackers: Any,
    way: str,
    first_step: int,
    steps: int,
) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    from megatron_lite.config.stability import OnSpike
    from megatron_lite.observe.heartbeat import Heartbeat
    from megatron_lite.observe.progress import Progress
    from megatron_lite.optim.batch_ramp import BatchSchedule
    from megatron_lite.train.callbacks import Report
    from megatron_lite.train.loop import Callback, Observer, Trainer
    from megatron_lite.train.stability.watch import UpdateJudge, Watch

    callbacks: list[Callback] = []
    heartbeat, observer = Heartbeat(), cast("Observer", _Blind())
    own = replace(config, stability=replace(config.stability, layer_interval=0))
    switch.judge = None
    if way != "bare":
        own = replace(config, stability=replace(config.stability, on_spike=OnSpike(way), layer_interval=STEPS))
        progress = Progress(None, steps, first_step=0, log_interval=1, enabled=False)  # type: ignore[arg-type]
        judge = UpdateJudge(own)
        switch.judge = judge.hook
        observer = Watch(own, engine, judge, source, heartbeat, None, [])
        callbacks = [Report(trackers, progress, 1.0, 1.0)]
    agreement = mock.Mock()
    schedule, last_step = BatchSchedule(config.train), first_step + steps
    trainer = Trainer(
        own, engine, source, schedule, agreement, observer, callbacks, first_step, lambda _: last_step, heartbeat
    )
    dist.barrier()
    before, wall = os.times(), time.perf_counter()
    trainer.fit()
    dist.barrier()
    wall, after = time.perf_counter() - wall, os.times()
    total = torch.tensor([after.user - before.user + after.system - before.system], dtype=torch.float64)
    dist.all_reduce(total)
    return {"cpu_seconds": float(total) / steps, "wall_seconds": wall / steps}


if __name__ == "__main__":
    main(*sys.argv[1:])
