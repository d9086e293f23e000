"""Suggestions for layouts that do not match the number of processes: only suggestions that no other rule refuses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from megatron_lite.config.derived import all_layers, given_processes, ranks_per_replica
from megatron_lite.config.ranges import MOST_PROCESSES
from megatron_lite.config.rules import launcher, model, nodes, training
from megatron_lite.config.rules.case import Case, Rule, divisors, nearest_multiples


@dataclass(frozen=True)
class NearestLayouts:
    """For a configuration whose layout does not match the given number of processes."""

    case: Case
    given: int
    of_layout: tuple[Rule, ...]
    """Layout rules that a suggestion must satisfy, in addition to those of other modules."""

    def remedies(self) -> str:
        """In words: the nearest process counts for this layout, and the nearest layout for this process count."""
        counts = [f"{count} processes (dp={count // self._replica})" for count in self._counts()]
        layout = self._layout()
        found = [*counts, *([] if layout is None else [layout])]
        return "use " + ", or ".join(found) if found else "use another number of processes"

    @property
    def _replica(self) -> int:
        return ranks_per_replica(self.case.config)

    @cached_property
    def _known(self) -> set[str]:
        """Problems that exist anyway; a suggestion need not solve them, but must not add any."""
        return set(self._problems(self.case))

    def _problems(self, case: Case) -> Iterator[str]:
        for rule in (
            *self.of_layout,
            model.tensor_divides_heads,
            model.tensor_divides_groups,
            model.tensor_divides_ffn,
            model.stages_have_layers,
            model.stages_are_cut_as_possible,
            training.batch_is_whole,
            training.ramp_is_whole,
            nodes.nodes_know_where_to_meet,
            nodes.deepspeed_knows_its_hosts,
            launcher.nodes_need_a_launcher_of_nodes,
            launcher.processes_fill_the_nodes,
            launcher.processes_have_gpus,
        ):
            yield from rule(case)

    def _is_valid(self, case: Case | None) -> bool:
        return case is not None and self._known.issuperset(self._problems(case))

    def _counts(self) -> list[int]:
        data = self.case.config.parallel.data_parallel_size
        if data is not None:
            return [data * self._replica] if self._is_valid(self._with_count(data)) else []
        train = self.case.config.train
        whole = divisors(train.global_batch_size // train.micro_batch_size) if self.case.sound(*BATCH) else []
        sizes = sorted({*whole, self.case.data})
        here = self.given / self._replica
        below = (size for size in reversed(sizes) if size < here)
        above = (size for size in sizes if size > here and size * self._replica <= MOST_PROCESSES)
        nearest = (self._first(below), self._first(above))
        return [size * self._replica for size in nearest if size is not None]

    def _first(self, sizes: Iterable[int]) -> int | None:
        return next((size for size in sizes if self._is_valid(self._with_count(size))), None)

    def _with_count(self, data: int) -> Case | None:
        """The case with this many replicas; None if no number of nodes gives exactly that many processes."""
        config, count = self.case.config, data * self._replica
        if self.case.world_size is not None:
            return Case(config, count)
        keys = [key for key in OF_A_NODE if getattr(config.launcher, key) is not None]
        changed: dict[str, Any] = {"num_processes": count}
        if keys:
            shared = shared_by_nodes(count, config.launcher.nodes, getattr(config.launcher, keys[0]))
            if shared is None:
                return None
            changed |= {"nodes": shared[0], **dict.fromkeys(keys, shared[1])}
        return Case(replace(config, launcher=replace(config.launcher, **changed)), None)

    def _layout(self) -> str | None:
        """The nearest layout that works with the given batch size; else one with the nearest other batch size."""
        train = self.case.config.train
        layouts = sorted(self._candidates(), key=self._distance)
        step = train.micro_batch_size if self.case.sound(*BATCH) else 1
        for size in layouts:
            if train.global_batch_size % (step * size[0]) == 0 and self._is_valid(self._with_layout(size)):
                return _words(size)
        for size in layouts[:MOST_TRIED]:
            for batch in nearest_multiples(train.global_batch_size, step * size[0]):
                if self._is_valid(self._with_layout(size, batch)):
                    return f"{_words(size)} with train.global_batch_size={batch}"
        return None

    def _candidates(self) -> Iterator[tuple[int, int, int]]:
        layers = all_layers(self.case.model)
        for tensor in divisors(self.given):
            if self.case.model.num_attention_heads % tensor == 0:
                for pipeline in divisors(self.given // tensor):
                    if pipeline <= layers:
                        yield self.given // (tensor * pipeline), tensor, pipeline

    def _distance(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Distance from the requested layout; among equals tensor is kept, then data is the larger."""
        data, tensor, pipeline = size
        off_tensor = abs(tensor - self.case.tensor)
        return off_tensor + abs(pipeline - self.case.pipeline) + abs(data - self.case.data), off_tensor, -data

    def _with_layout(self, size: tuple[int, int, int], batch: int | None = None) -> Case:
        config, (data, tensor, pipeline) = self.case.config, size
        sizes: dict[str, Any] = {
            "data_parallel_size": data,
            "tensor_parallel_size": tensor,
            "pipeline_parallel_size": pipeline,
        }
        changed = replace(config, parallel=replace(config.parallel, **sizes))
        if batch is not None:
            changed = replace(changed, train=replace(config.train, global_batch_size=batch))
        if self.case.world_size is None and config.launcher.num_processes is None:
            changed = replace(changed, launcher=replace(config.launcher, num_processes=given_processes(config)))
        return Case(changed, self.case.world_size)


BATCH = ("train.global_batch_size", "train.micro_batch_size")
OF_A_NODE = ("processes_per_node", "gpus_per_node")
MOST_TRIED = 20
"""Largest number of layouts tried with other batch sizes: a count with many divisors has thousands of layouts."""


def _words(size: tuple[int, int, int]) -> str:
    return "the layout dp={} tp={} pp={}".format(*size)


def shared_by_nodes(count: int, nodes: int, here: int) -> tuple[int, int] | None:
    """(nodes, processes per node) with this product: whole nodes, else no more on a node than there are now."""
    if count % here == 0:
        return count // here, here
    if count < here:
        return 1, count
    return (nodes, count // nodes) if count % nodes == 0 and count // nodes <= here else None
