"""How the suite spends its time: one thread a process, and the long files first."""

from __future__ import annotations

import os

import pytest

# Tensors of tests are tiny, and `make test` keeps all cores busy with processes: more threads would spend many times
# the work itself waiting for each other at the end of each operation. torch reads it when it is imported.
os.environ["OMP_NUM_THREADS"] = "1"

# Those of jobs wait for Slurm more than they compute, so each runs beside another that computes.
FIRST = ("test_slurm_training.py", "test_equivalence.py", "test_slurm.py", "test_rehearsal.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """xdist hands out whole files, in the order of collection: a long one at the end would run alone."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
