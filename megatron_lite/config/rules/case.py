"""The input of a rule, and texts that rules share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from megatron_lite.config.derived import data_parallel_size, fill_in_model
from megatron_lite.config.rules.values import out_of_form, out_of_range
from megatron_lite.config.schema import ModelConfig, RunConfig

SIZES = ("parallel.data_parallel_size", "parallel.tensor_parallel_size", "parallel.pipeline_parallel_size")
PROCESSES = ("launcher.num_processes", "launcher.nodes", "launcher.processes_per_node", "launcher.gpus_per_node")
ALTERNATIVES = 12  # largest number that a message lists


@dataclass
class Case:
    """A configuration to check."""

    config: RunConfig
    world_size: int | None
    """Existing processes; None = as many as the configuration itself says."""

    @cached_property
    def model(self) -> ModelConfig:
        return fill_in_model(self.config.model)

    @cached_property
    def broken(self) -> set[str]:
        """Keys whose value is out of range."""
        return {key for key, _ in (*out_of_range(self.config), *out_of_form(self.config))}

    @property
    def tensor(self) -> int:
        return self.config.parallel.tensor_parallel_size

    @property
    def pipeline(self) -> int:
        return self.config.parallel.pipeline_parallel_size

    @property
    def data(self) -> int:
        return data_parallel_size(self.config, self.world_size)

    def sound(self, *keys: str) -> bool:
        """Whether the values of all these keys are in range, so that a rule may use them."""
        return self.broken.isdisjoint(keys)


Rule = Callable[[Case], Iterator[str]]


def divisors(number: int) -> list[int]:
    """In ascending order; takes O(sqrt(number))."""
    small = [candidate for candidate in range(1, math.isqrt(number) + 1) if number % candidate == 0]
    return sorted({*small, *(number // candidate for candidate in small)})


def nearest_multiples(number: int, step: int) -> list[int]:
    """The positive multiples of `step` next to `number`, below and above."""
    below = number // step * step
    return [multiple for multiple in (below, below + step) if multiple > 0]


def either(options: list[int]) -> str:
    """`1, 2 or 4`."""
    words = [str(option) for option in options[-ALTERNATIVES:]]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]
