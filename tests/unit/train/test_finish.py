"""A page that cannot be written is reported, and fails no run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from megatron_lite.train import finish
from tests.plain_console import plain_console


@pytest.mark.parametrize("name", ["report.html", "loss.png"])
def test_a_page_that_cannot_be_written_is_reported_in_one_line(name: str, tmp_path: Path) -> None:
    def fail() -> Path:
        raise OSError(28, "No space left\non device")

    stream = io.StringIO()
    assert finish._drawn(tmp_path / name, fail, plain_console(stream)) is None
    assert stream.getvalue() == (
        f"{name} could not be written (OSError: [Errno 28] No space left on device); "
        f"try `python -m launch report {tmp_path}`\n"
    )
