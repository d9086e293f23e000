"""The check before the first step, with real ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import LaunchError
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.topology import Topology
from megatron_lite.train.startup import measure_links, require_same_program
from tests.distributed.harness import run_ranks

CPU = torch.device("cpu")


def _check(odd_rank: int | None) -> list[str] | str:
    config = RunConfig()
    if dist.get_rank() == odd_rank:
        config.train.steps += 1
    try:
        return require_same_program(config, CPU, local_rank=dist.get_rank())
    except LaunchError as error:
        return str(error)


def test_equal_ranks_learn_their_nodes() -> None:
    first, second = run_ranks(_check, 2, None)
    assert first == second
    assert len(first) == 2


def test_another_configuration_is_named_on_every_rank() -> None:
    first, *others = run_ranks(_check, 3, 1)
    assert first.startswith("the ranks differ in their configuration: ")
    assert " on ranks 0, 2 (node " in first
    assert " on rank 1 (node " in first
    assert others == [first, first]


def _measure(topology: Topology) -> tuple[str, list[tuple[int, ...]]]:
    context = ParallelContext.build(topology, device=CPU, sequence_parallel=False, seed=1)
    links = measure_links(context, ["n1"] * topology.world_size)
    assert all(seconds > 0 for groups in links.seconds.values() for seconds in groups.values())
    return sorted(links.seconds), [group for groups in links.seconds.values() for group in groups]


def test_every_group_is_timed() -> None:
    answers = run_ranks(_measure, 4, Topology(data_parallel_size=2, pipeline_parallel_size=2))
    assert answers == [(["data", "pipeline"], [(0, 1), (2, 3), (0, 2), (1, 3)])] * 4
