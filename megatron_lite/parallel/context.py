"""The parallel context: this rank's coordinates in the layout, its process groups and its random states.

It is built once per process and passed through constructors. There are no global process groups to look up, so one
process can hold several contexts (the equivalence check compares a layout with a one-rank context).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_lite.parallel.auxiliary import AuxiliaryChannel
from megatron_lite.parallel.rng import RngStates
from megatron_lite.parallel.topology import Coordinates, Topology


@dataclass
class ParallelContext:
    """Coordinates, process groups and random states of one rank. A group with a single rank is None."""

    topology: Topology
    rank: int
    device: torch.device
    tensor_group: dist.ProcessGroup | None
    data_group: dist.ProcessGroup | None
    pipeline_group: dist.ProcessGroup | None
    sequence_parallel: bool
    """Activations between sharded layers are split along the sequence; never True without tensor parallelism."""
    seed: int
    rng: RngStates
    auxiliary: AuxiliaryChannel

    @classmethod
    def single(cls, seed: int = 1234, device: torch.device | str = "cpu") -> ParallelContext:
        """The context of a one-rank job; needs no torch.distributed."""
        device = torch.device(device)
        rng = RngStates(seed, tensor_rank=0, device=device)
        auxiliary = AuxiliaryChannel(0, 1, device)
        return cls(Topology(), 0, device, None, None, None, False, seed, rng, auxiliary)

    @classmethod
    def build(cls, topology: Topology, *, device: torch.device, sequence_parallel: bool, seed: int) -> ParallelContext:
        """Create this rank's process groups from the initialised default group. A collective of all ranks."""
        world_size = dist.get_world_size()
        if world_size != topology.world_size:
            raise ValueError(f"the job has {world_size} ranks, the layout {topology} needs {topology.world_size}")
        rank = dist.get_rank()
        tensor_rank = topology.coordinates(rank).tensor
        return cls(
            topology=topology,
            rank=rank,
            device=device,
            tensor_group=_own_group(topology.tensor_groups(), rank),
            data_group=_own_group(topology.data_groups(), rank),
            pipeline_group=_own_group(topology.pipeline_groups(), rank),
            sequence_parallel=sequence_parallel and topology.tensor_parallel_size > 1,
            seed=seed,
            rng=RngStates(seed, tensor_rank=tensor_rank, device=device),
            auxiliary=AuxiliaryChannel(tensor_rank, world_size, device),
        )

    @property
    def coordinates(self) -> Coordinates:
        return self.topology.coordinates(self.rank)

    @property
    def tensor_rank(self) -> int:
        return self.coordinates.tensor

    @property
    def tensor_size(self) -> int:
        return self.topology.tensor_parallel_size

    @property
    def data_rank(self) -> int:
        return self.coordinates.data

    @property
    def data_size(self) -> int:
        return self.topology.data_parallel_size

    @property
    def pipeline_rank(self) -> int:
        return self.coordinates.pipeline

    @property
    def pipeline_size(self) -> int:
        return self.topology.pipeline_parallel_size

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    @property
    def is_writer(self) -> bool:
        """True on the one rank of the job that writes the files that only one rank may write."""
        return self.rank == 0


def _own_group(groups: list[list[int]], rank: int) -> dist.ProcessGroup | None:
    """Create all groups and return the one that contains `rank`.

    `dist.new_group` is a collective of the whole job: every rank must call it for every group, in the same order, also
    for groups that it is not a member of.
    """
    own = None
    for ranks in groups:
        if len(ranks) == 1:
            continue
        group = dist.new_group(ranks)
        if rank in ranks:
            own = group
    return own
