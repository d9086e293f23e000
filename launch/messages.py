"""How errors are shown to the user: one line per problem, once per job, with a traceback only on request."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from megatron_lite.errors import ConfigError, DamagedFileError, RunEnd
from megatron_lite.files import publish_first
from megatron_lite.observe.credentials import redacted
from megatron_lite.observe.markers import read_marker
from megatron_lite.state_files import read_text

TAIL_LINES = 15


def error_text(error: Exception | str, *, debug: bool = False) -> str:
    """`error: ...` for every problem of the error, preceded by its traceback if `debug`."""
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    lines = [f"error: {problem}" for problem in problems]
    if debug and isinstance(error, Exception):
        lines.insert(0, "".join(traceback.format_exception(error)).rstrip())
    return redacted("\n".join(lines))


def show_error(error: Exception | str, *, debug: bool = False) -> None:
    print(error_text(error, debug=debug), file=sys.stderr, flush=True)


def show_traceback() -> None:
    """Print the traceback of the exception being handled, without credentials in its message."""
    print(redacted(traceback.format_exc()), file=sys.stderr, flush=True)


def leave_error(path: Path, text: str) -> None:
    """Leave the message for the launcher to show. Only the first rank's is kept: the others have the same error."""
    publish_first(path, text + "\n")


def told_end(run_dir: Path, error_file: Path) -> RunEnd | None:
    """How the ranks report that the run ended, after showing their message; None if they left no reason."""
    marker = read_marker(run_dir)
    if marker is None or marker.end is RunEnd.FAILED:
        return None
    show_left_error(error_file)
    return marker.end


def show_left_error(error_file: Path) -> bool:
    """Show the message that the ranks left, if any; returns whether there was one."""
    try:
        text = (read_text(error_file) or "").strip("\0 \n")
    except DamagedFileError as error:
        text = f"warning: {error}"
    if text:
        print(text, file=sys.stderr, flush=True)
    return bool(text)


def tail(path: Path, start: int = 0, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of what a log contains from byte `start` on; empty if there is no log."""
    try:
        if not path.is_file():  # reading a pipe would wait forever
            return []
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(start, file.tell() - 16384))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return text.splitlines()[-lines:]
