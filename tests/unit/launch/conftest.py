"""What tests of launching share: a machine without Slurm, whatever this one has."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A dry run asks the Slurm that it finds, and the one of the jobs' tests lives as long as their process."""
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "no-slurm.conf"))
