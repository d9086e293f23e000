"""A page that cannot be written is told of, and fails no run."""

from __future__ import annotations

import io
from pathlib import Path

from megatron_lite.observe.console import plain_console
from megatron_lite.train import finish


def test_a_report_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    def fail() -> Path:
        raise OSError(28, "No space left\non device")

    stream = io.StringIO()
    assert finish._drawn("report.html", fail, tmp_path, plain_console(stream)) is None
    assert stream.getvalue() == (
        "report.html could not be written (OSError: [Errno 28] No space left on device); "
        f"try `python -m launch report {tmp_path}`\n"
    )
