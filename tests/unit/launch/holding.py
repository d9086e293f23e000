"""A run folder that somebody holds, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_lite.observe.run_lock import Role, RunLock, take


@contextmanager
def held(run_dir: Path, attempt: str = "another") -> Iterator[RunLock]:
    """As rank 0 of an attempt holds it that this process runs."""
    lock = take(run_dir, Role.rank, attempt)
    try:
        yield lock
    finally:
        lock.release()
