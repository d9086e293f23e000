"""What tests of launching share: a machine without Slurm, whatever this one has."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run asks the Slurm that it finds, and the one of the jobs' tests lives as long as their process.

    An empty file: Slurm's commands would wait a minute for one that is missing.
    """
    monkeypatch.setenv("SLURM_CONF", os.devnull)
