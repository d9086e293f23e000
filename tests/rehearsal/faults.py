"""Faults that a rehearsal must catch, planted into the real code of the process that rehearses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

FAULTS: dict[str, Callable[[], AbstractContextManager[object]]] = {}


@contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """None = no fault."""
    if fault is None:
        yield
        return
    with FAULTS[fault]():
        yield
