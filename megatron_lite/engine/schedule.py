"""Micro-batch boundaries: where all ranks of a job stand between two pieces of work, and so can agree on something.

DeepSpeed's pipeline schedules have as many steps on every stage, and a send and its receive lie in the same one: a
collective between two of them cannot block (DeepSpeed, runtime/pipe/schedule.py, `PipeSchedule`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class BoundedSchedule:
    """A pipeline schedule of DeepSpeed that calls `at_boundary` ahead of each of its steps."""

    def __init__(self, schedule: Any, at_boundary: Callable[[], None]) -> None:
        self._schedule = schedule
        self._at_boundary = at_boundary

    def num_pipe_buffers(self) -> int:
        return self._schedule.num_pipe_buffers()

    def __iter__(self) -> Iterator[list[Any]]:
        for commands in self._schedule:
            self._at_boundary()
            yield commands


def call_at_boundaries(deepspeed_engine: Any, at_boundary: Callable[[], None]) -> None:
    """Let a PipelineEngine call `at_boundary` between the steps of its schedules, of training and of evaluation.

    What `at_boundary` raises leaves the engine in the middle of a batch: weights and optimizer are those of the last
    finished step and can be saved, but nothing more can be trained.
    """
    execute = deepspeed_engine._exec_schedule
    deepspeed_engine._exec_schedule = lambda schedule: execute(BoundedSchedule(schedule, at_boundary))
