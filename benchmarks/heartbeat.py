"""The cost of heartbeats: `python -m benchmarks.heartbeat`.

The training thread pays for each phase that it enters, the watchdog thread for each heartbeat that it writes.
"""

from __future__ import annotations

import os
import tempfile
import timeit
from pathlib import Path

from megatron_lite.observe.heartbeat import Beat, Heartbeat, Phase, Place, node_name, publish

CALLS = 200_000
PUBLICATIONS = 2_000
REPEATS = 5


def nanoseconds_per_phase() -> float:
    """The fastest of several loops, divided by its calls; the loop's own overhead is included."""
    heartbeat = Heartbeat()
    times = timeit.repeat(lambda: heartbeat.enter(Phase.FORWARD, 3), number=CALLS, repeat=REPEATS)
    return min(times) / CALLS * 1e9


def microseconds_per_publication(folder: Path) -> float:
    """The same, for writing a heartbeat on the filesystem of `folder`."""
    heartbeat, place = Heartbeat(), Place(0, node_name(), os.getpid(), 0, 0, 0)
    times = timeit.repeat(lambda: publish(folder, Beat.of(place, heartbeat)), number=PUBLICATIONS, repeat=REPEATS)
    return min(times) / PUBLICATIONS * 1e6


if __name__ == "__main__":
    print(f"entering a phase {nanoseconds_per_phase():.0f} ns")
    with tempfile.TemporaryDirectory() as name:
        print(f"publishing it    {microseconds_per_publication(Path(name)):.0f} us")
