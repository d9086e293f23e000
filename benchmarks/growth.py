"""How the cost of a token grows with sequence, vocabulary, depth, micro-batches, ranks and stages.

`python -m benchmarks.growth TURNS STEPS AXIS...` prints one JSON list with the cost of every point. Each point is a job
of its own; the points of an axis take turns, A B C A B C.

A cost that grows like its work has the same CPU-seconds per FLOP at every point of its axis.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.ranks import build_rank, run_job
from benchmarks.shape import LAYERS, SEED, SEQ_LENGTH, Shape

TOKENS = 2048  # of a micro-batch on the axes of sequence and ranks: the longest sequence
FASTER_THAN_WORK = 1.2  # CPU-seconds per FLOP beside those of the axis's first point, from which growth is marked


@dataclass(frozen=True)
class Point:
    """One job: a model, a layout and a number of micro-batches."""

    label: str
    layers: int = LAYERS
    vocab_size: int = 8192
    seq_length: int = SEQ_LENGTH
    micro_batch: int = 4
    micro_batches: int = 1
    data: int = 1
    pipeline: int = 1
    stages: str = "balanced"

    def shape(self) -> Shape:
        from megatron_lite.config.schema import Precision

        return Shape(self.vocab_size, Precision.fp32, self.layers, self.seq_length, self.micro_batch)


AXES: dict[str, tuple[Point, ...]] = {
    "sequence": tuple(
        Point(f"{length}", seq_length=length, micro_batch=TOKENS // length) for length in (128, 256, 512, 1024, 2048)
    ),
    "vocabulary": tuple(Point(f"{size:,}", vocab_size=size) for size in (8192, 32768, 131072)),
    "depth": tuple(Point(f"{layers}", layers=layers) for layers in (3, 6, 12, 24)),
    "micro-batches": tuple(Point(f"{count}", micro_batches=count) for count in (1, 2, 4, 8)),
    "ranks": tuple(Point(f"dp{count}", data=count, micro_batches=2) for count in (1, 2, 4, 8)),
    "stages": (
        Point("pp1", micro_batches=8),
        Point("pp2", micro_batches=8, pipeline=2),
        Point("pp4", micro_batches=8, pipeline=4),
    ),
    "cut": tuple(
        Point(f"pp2 {stages} {vocab:,}", vocab_size=vocab, micro_batches=4, pipeline=2, stages=stages)
        for vocab in (8192, 50304)
        for stages in ("even", "balanced")
    ),
}
"""Name of an axis -> its points, of which the first is what the others are compared to."""


@dataclass
class Found:
    """Measurements of one point, one entry per turn."""

    axis: str
    label: str
    flops_per_token: float
    cpu_seconds_per_token: list[float] = field(default_factory=list)  # of all ranks
    largest_share: list[float] = field(default_factory=list)  # CPU-seconds of the busiest rank / mean of the ranks
    slowest_seconds: list[float] = field(default_factory=list)  # CPU-seconds a step of the busiest rank
    peak_bytes: list[int] = field(default_factory=list)  # resident memory of the largest rank

    @property
    def seconds_per_flop(self) -> float:
        return min(self.cpu_seconds_per_token) / self.flops_per_token


def main(turns: str, steps: str, *axes: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    found = [one for axis in axes or AXES for one in measure(axis, int(turns), int(steps))]
    answers.write(json.dumps([vars(one) for one in found]) + "\n")


def measure(axis: str, turns: int, steps: int) -> Sequence[Found]:
    points = AXES[axis]
    found = [Found(axis, point.label, point.shape().flops_per_step() / point.shape().tokens) for point in points]
    for _ in range(turns):
        for point, one in zip(points, found, strict=True):
            ranks = json.loads(run_job(point.data * point.pipeline, _rank, point, steps))
            seconds = [rank["cpu_seconds"] for rank in ranks]
            tokens = point.shape().tokens * point.micro_batches * point.data
            one.cpu_seconds_per_token.append(sum(seconds) / tokens)
            one.largest_share.append(max(seconds) * len(seconds) / sum(seconds))
            one.slowest_seconds.append(max(seconds))
            one.peak_bytes.append(max(rank["peak_bytes"] for rank in ranks))
    return found


def _rank(rank: int, folder: Path, point: Point, steps: int) -> None:
    import resource

    import torch.distributed as dist

    from megatron_lite.optim.batch_ramp import BatchStep
    from megatron_lite.parallel.topology import Topology

    layout = Topology(point.data, 1, point.pipeline)
    global_batch = point.micro_batch * point.micro_batches * point.data
    shape = point.shape()
    engine = build_rank(rank, folder, layout, shape, global_batch, stages=point.stages)
    first = SEED + engine.context.data_rank * point.micro_batches
    batches = [shape.batch(first + index) for index in range(point.micro_batches)]

    def step() -> None:
        engine.train_step(batches, BatchStep(0, global_batch), 3e-4)

    step()
    dist.barrier()
    before = time.process_time()
    for _ in range(steps):
        step()
    cost = {
        "cpu_seconds": (time.process_time() - before) / steps,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    costs: list[Any] = [None] * layout.world_size
    dist.all_gather_object(costs, cost)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(costs))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
