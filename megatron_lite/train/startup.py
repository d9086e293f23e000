"""Checks before the first step: do all ranks run the same program, and how fast are the links of their groups?

Otherwise a node with another version, another configuration or a bad cable shows up as a hang or as a wrong loss curve,
hours later.
"""

from __future__ import annotations

import hashlib
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.errors import LaunchError
from megatron_lite.observe.heartbeat import node_name
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.topology import Topology
from megatron_lite.train.hang.diagnosis import ranks_text

MESSAGE_ELEMENTS = 2**18  # float32: 1 MiB
REPEATS = 3
SLOW_RATIO = 5.0  # of a group's time to the median of the groups of its kind
SLOW_SECONDS = 0.02  # a busy machine can add that much to an all-reduce

REMEDIES = {
    "python": "start all ranks with the same interpreter",
    "torch": "install the same version on all nodes",
    "deepspeed": "install the same version on all nodes",
    "code of megatron_lite": "check out the same commit on all nodes, without local changes",
    "configuration": "start all ranks with the same overrides, or with one --config file",
    "device": "use nodes with the same kind of device",
}


@dataclass(frozen=True)
class Identity:
    """What is compared between the ranks."""

    node: str
    same: Mapping[str, str | None]
    """What must be equal on all ranks, by the names of REMEDIES; None = another rank of this node reports it."""
    gpu: str | None
    """UUID of the GPU, which two ranks must not share; None = a CPU."""

    @classmethod
    def here(cls, config: ResolvedConfig, device: torch.device, local_rank: int) -> Identity:
        gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        same = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "deepspeed": version("deepspeed"),
            "code of megatron_lite": code_fingerprint() if local_rank == 0 else None,
            "configuration": hashlib.sha256(repr(config).encode()).hexdigest()[:12],
            "device": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" if gpu else device.type,
        }
        return cls(node_name(), same, str(gpu.uuid) if gpu else None)


def code_fingerprint() -> str:
    """Hash of this package's sources: it detects local changes that a version number would not show."""
    package = Path(__file__).parents[1]
    digest = xxhash.xxh3_64()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def versions() -> dict[str, str]:
    """The versions that, besides configuration and data, determine what a run computes."""
    return {
        "megatron_lite": code_fingerprint(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "python": platform.python_version(),
    }


def require_same_program(config: ResolvedConfig, device: torch.device, local_rank: int) -> list[str]:
    """Compare all ranks before they create process groups, which would hang if they differ. A collective of all ranks.

    Returns:
        the node of each rank
    Raises:
        LaunchError: they differ; the same error on every rank.
    """
    identities: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(identities, Identity.here(config, device, local_rank))
    problems = differences(identities)
    if problems:
        raise LaunchError("; ".join(problems))
    return [identity.node for identity in identities]


def differences(identities: Sequence[Identity]) -> list[str]:
    """One sentence for each difference between the ranks."""
    nodes = [identity.node for identity in identities]
    problems = []
    for name, remedy in REMEDIES.items():
        holders = defaultdict(list)
        for rank, identity in enumerate(identities):
            if identity.same[name] is not None:
                holders[identity.same[name]].append(rank)
        if len(holders) > 1:
            found = ", ".join(f"{value} on {_spell(ranks, nodes)}" for value, ranks in holders.items())
            problems.append(f"the ranks differ in their {name}: {found}; {remedy}")
    sharers = defaultdict(list)
    for rank, identity in enumerate(identities):
        if identity.gpu is not None:
            sharers[identity.gpu].append(rank)
    problems += [
        f"{_spell(ranks, nodes)} use the same GPU; set the same CUDA_VISIBLE_DEVICES on all ranks of a node"
        for ranks in sharers.values()
        if len(ranks) > 1
    ]
    return problems


def _spell(ranks: Sequence[int], nodes: Sequence[str]) -> str:
    names = list(dict.fromkeys(nodes[rank] for rank in ranks))
    return f"{ranks_text(ranks)} ({'node' if len(names) == 1 else 'nodes'} {', '.join(names)})"


@dataclass(frozen=True)
class Links:
    """How long an all-reduce of 1 MiB takes in each group of each kind."""

    nodes: list[str]
    """The node of each rank."""
    seconds: dict[str, dict[tuple[int, ...], float]]
    """Kind of group -> its ranks -> time of the slowest rank."""

    @property
    def medians(self) -> dict[str, float]:
        return {kind: statistics.median(groups.values()) for kind, groups in self.seconds.items()}

    @property
    def line(self) -> str:
        """The line for the console."""
        count, nodes = len(self.nodes), len(set(self.nodes))
        who = f"{count} rank{'s' if count > 1 else ''} on {nodes} node{'s' if nodes > 1 else ''}"
        if not self.seconds:
            return who
        times = ", ".join(f"{kind} {1e3 * median:.1f} ms" for kind, median in self.medians.items())
        return f"{who}; all-reduce of 1 MiB: {times}"

    @property
    def warnings(self) -> list[str]:
        """Groups that are much slower than the others of their kind."""
        medians = self.medians
        return [
            f"warning: the {kind} group of {_spell(ranks, self.nodes)} takes {1e3 * seconds:.0f} ms for an all-reduce "
            f"of 1 MiB, the median is {1e3 * medians[kind]:.1f} ms: a bad link, or a busy node"
            for kind, groups in self.seconds.items()
            for ranks, seconds in groups.items()
            if seconds > SLOW_RATIO * medians[kind] and seconds > medians[kind] + SLOW_SECONDS
        ]

    @property
    def figures(self) -> dict[str, Any]:
        """The figures for events.jsonl."""
        return {
            "nodes": list(dict.fromkeys(self.nodes)),
            "all_reduce_milliseconds": {
                kind: {"median": round(1e3 * self.medians[kind], 3), "highest": round(1e3 * max(groups.values()), 3)}
                for kind, groups in self.seconds.items()
            },
            "warnings": self.warnings,
        }


def measure_links(context: ParallelContext, nodes: list[str]) -> Links:
    """Time each kind of group in turn, all its groups at once, as in training. A collective of all ranks."""
    groups = {"tensor": context.tensor_group, "data": context.data_group, "pipeline": context.pipeline_group}
    own = {kind: _all_reduce_seconds(group, context.device) for kind, group in groups.items() if group is not None}
    everyone: list[Any] = [None] * len(nodes)
    dist.all_gather_object(everyone, own)
    return collect(everyone, context.topology, nodes)


def collect(measured: Sequence[Mapping[str, float]], topology: Topology, nodes: list[str]) -> Links:
    """Combine each rank's own times into times of groups."""
    groups = {
        "tensor": topology.tensor_groups(),
        "data": topology.data_groups(),
        "pipeline": topology.pipeline_groups(),
    }
    return Links(
        nodes,
        {
            kind: {tuple(ranks): max(measured[rank][kind] for rank in ranks) for ranks in groups[kind]}
            for kind in groups
            if len(groups[kind][0]) > 1
        },
    )


def _all_reduce_seconds(group: dist.ProcessGroup, device: torch.device) -> float:
    """The shortest of a few all-reduces, after a first one that sets up the connections."""
    message = torch.zeros(MESSAGE_ELEMENTS, device=device)
    times = []
    for _ in range(1 + REPEATS):
        begin = time.perf_counter()
        dist.all_reduce(message, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])
