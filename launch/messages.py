"""How errors reach the user: one line per problem, once per job, with a traceback only on request."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from megatron_lite.errors import ConfigError
from megatron_lite.files import publish_first

TAIL_LINES = 15


def error_text(error: Exception | str, *, debug: bool = False) -> str:
    """`error: ...` for every problem of the error; its traceback first where `debug` asks for it."""
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    lines = [f"error: {problem}" for problem in problems]
    if debug and isinstance(error, Exception):
        lines.insert(0, "".join(traceback.format_exception(error)).rstrip())
    return "\n".join(lines)


def show_error(error: Exception | str, *, debug: bool = False) -> None:
    print(error_text(error, debug=debug), file=sys.stderr, flush=True)


def leave_error(path: Path, text: str) -> None:
    """Leave the message for the launcher to show. The first rank wins; the others have the same to say."""
    publish_first(path, text + "\n")


def tail(path: Path, start: int = 0, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log, of what was written from byte `start` on; none where there is no log."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(start, file.tell() - 16384))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return text.splitlines()[-lines:]
