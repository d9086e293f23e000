"""What a rehearsal records: plain data, sent from the process that rehearsed to the test that judges it.

No torch here: tests read it without importing anything large.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

MICRO_BATCH = ("load", "receive", "forward", "send", "receive_grad", "backward", "send_grad")
"""Phases that run once for each micro-batch: the pipeline's instructions."""


@dataclass
class Work:
    """What one phase launched on the device."""

    kernels: int = 0
    bytes: int = 0
    """Read and written by those kernels: the sizes of their inputs and outputs."""
    flops: int = 0


@dataclass
class Message:
    """What one rank sent through one process group with one kind of collective."""

    calls: int = 0
    bytes: float = 0.0
    """On the wire, sent by this rank, with the algorithm that needs the fewest; see `wire.py`."""


@dataclass
class Act:
    """One part of a rehearsed run: building the engine, a step, an evaluation ..."""

    waits: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """By phase: how often the host waited for the device; kind of wait and place in the code -> count."""
    late_waits: Counter[str] = field(default_factory=Counter)
    """Waits for something that the device was given in an earlier step: it has normally long finished."""
    work: dict[str, Work] = field(default_factory=lambda: defaultdict(Work))
    """By phase."""
    operations: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """By phase: how many kernels of each kind."""
    messages: dict[tuple[str, str], Message] = field(default_factory=lambda: defaultdict(Message))
    """By (name of the group, operation)."""
    peak_bytes: int = 0
    """The most memory of the device that was alive at one moment."""
    left_bytes: int = 0
    """Memory of the device that was alive at the end."""
    result: str = ""
    """What the act returned, as text."""

    @property
    def num_waits(self) -> int:
        return sum(sum(found.values()) for found in self.waits.values())

    @property
    def waits_in_micro_batches(self) -> Counter[str]:
        return sum((self.waits[phase] for phase in MICRO_BATCH if phase in self.waits), Counter())

    @property
    def waits_outside(self) -> Counter[str]:
        return sum((found for phase, found in self.waits.items() if phase not in MICRO_BATCH), Counter())

    @property
    def total(self) -> Work:
        """Of all phases."""
        return Work(*(sum(getattr(one, name) for one in self.work.values()) for name in ("kernels", "bytes", "flops")))

    def wire_bytes(self, group: str) -> float:
        return sum(message.bytes for (name, _), message in self.messages.items() if name == group)


@dataclass
class Recording:
    """A whole rehearsal of one rank."""

    acts: dict[str, Act] = field(default_factory=dict)
    """By name, in order."""
    error: str = ""
    """The traceback that ended it; empty = it ran to its end."""
    num_micro_batches: int = 0
    """Of one step on this rank."""
    planned_bytes: float = 0.0
    """What the planner says that this rank's stage needs."""
    minimum_wire_bytes: dict[str, float] = field(default_factory=dict)
    """By group: the fewest bytes that this rank has to send in a step; see `wire.minimum_bytes`."""
    cpu_seconds: float = 0.0
