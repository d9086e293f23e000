"""Which node each rank is on, and what that costs. Node k has the ranks from k times processes_per_node on."""

from __future__ import annotations

import math

from megatron_lite.config.derived import all_layers
from megatron_lite.config.resolved import ResolvedConfig


def nodes_of(config: ResolvedConfig, first_rank: int, last_rank: int) -> str:
    """`node 0` or `nodes 0-3` for neighbouring ranks, first and last included."""
    here = config.processes_per_node
    first, last = first_rank // here, last_rank // here
    return f"node {first}" if first == last else f"nodes {first}-{last}"


def placement_warnings(config: ResolvedConfig) -> list[str]:
    """Warnings, with keys and remedy, about slow communication due to the placement of a valid configuration's ranks.

    Tensor-parallel ranks are neighbours, and exchange activations four times per layer and micro-batch. Pipeline and
    data-parallel communication is smaller, or overlaps with computation, and may cross nodes.
    """
    tensor, here = config.parallel.tensor_parallel_size, config.processes_per_node
    if config.launcher.nodes == 1 or here % tensor == 0:
        return []
    inside = math.gcd(tensor, here)
    remedy = f"parallel.tensor_parallel_size={inside}"
    stages = config.parallel.pipeline_parallel_size * tensor // inside
    given = isinstance(config.parallel.stages, list)
    if stages <= all_layers(config.model) and config.parallel.zero_stage <= 1 and not given:
        remedy += f" with parallel.pipeline_parallel_size={stages}"
    return [
        f"parallel.tensor_parallel_size={tensor} crosses nodes of launcher.processes_per_node={here}: the all-reduces "
        f"of every layer go over the network; use {remedy}, or a launcher.processes_per_node that {tensor} divides"
    ]
