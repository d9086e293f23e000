"""Arithmetic of a layout: coordinates of ranks, members of process groups, layers of each stage.

No torch, no processes: the planner, the launcher's dry run and every rank use the same functions.

Ranks are numbered with the tensor axis innermost, then data, then pipeline (DeepSpeed's
`PipeModelDataParallelTopology`): tensor-parallel groups communicate the most, so their ranks are consecutive and
normally on the same node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple


class Coordinates(NamedTuple):
    """Coordinates of one rank on the three axes."""

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Topology:
    """A grid of pipeline x data x tensor ranks."""

    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1

    @property
    def world_size(self) -> int:
        return self.data_parallel_size * self.tensor_parallel_size * self.pipeline_parallel_size

    def rank(self, pipeline: int, data: int, tensor: int) -> int:
        return (pipeline * self.data_parallel_size + data) * self.tensor_parallel_size + tensor

    def coordinates(self, rank: int) -> Coordinates:
        rest, tensor = divmod(rank, self.tensor_parallel_size)
        pipeline, data = divmod(rest, self.data_parallel_size)
        return Coordinates(pipeline, data, tensor)

    def tensor_groups(self) -> list[list[int]]:
        """Ranks that hold slices of the same layers for the same data: one list per (pipeline, data)."""
        return [
            [self.rank(p, d, t) for t in range(self.tensor_parallel_size)]
            for p in range(self.pipeline_parallel_size)
            for d in range(self.data_parallel_size)
        ]

    def data_groups(self) -> list[list[int]]:
        """Ranks that hold the same parameters and get different data: one list per (pipeline, tensor)."""
        return [
            [self.rank(p, d, t) for d in range(self.data_parallel_size)]
            for p in range(self.pipeline_parallel_size)
            for t in range(self.tensor_parallel_size)
        ]

    def pipeline_groups(self) -> list[list[int]]:
        """Ranks that one micro-batch passes through, in order: one list per (data, tensor)."""
        return [
            [self.rank(p, d, t) for p in range(self.pipeline_parallel_size)]
            for d in range(self.data_parallel_size)
            for t in range(self.tensor_parallel_size)
        ]


def even_cut(num_layers: int, stages: int) -> list[int]:
    """Number of transformer layers of each stage, as equal as possible; the earlier stages take the remainder.

    The last stage also holds the output head, so it never gets an extra layer.
    """
    base, extra = divmod(num_layers, stages)
    return [base + (stage < extra) for stage in range(stages)]


def stage_bounds(starts: Sequence[int], num_entries: int, layers_of_stages: Sequence[int]) -> list[int]:
    """Boundaries of the stages in the full layer list.

    Args:
        starts: for each transformer layer, the index of its first entry; then that of the first entry after the last
            layer. Entries before the first layer (embeddings) go to the first stage, those after the last layer (final
            norm, head) to the last stage.
        num_entries: length of the list.
        layers_of_stages: number of transformer layers of each stage.
    Returns:
        indices, one more than stages; stage i holds entries [bounds[i], bounds[i + 1]).
    """
    ends = list(accumulate(layers_of_stages))
    return [0, *(starts[end] for end in ends[:-1]), num_entries]


def padded_vocab_size(vocab_size: int, multiple: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding: vocab_size rounded up so that every tensor-parallel rank gets a multiple of `multiple`."""
    step = multiple * tensor_parallel_size
    return -(-vocab_size // step) * step


def bubble_share(stages: int, micro_batches: int) -> float:
    """The pipeline bubble, the share of a step in which a stage is idle: (p - 1) / (m + p - 1) (arXiv 1811.06965)."""
    return (stages - 1) / (micro_batches + stages - 1)
