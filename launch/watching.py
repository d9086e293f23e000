"""`python -m launch report`, `compare` and `trace`: a run's report, two runs side by side, the text of a step."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from launch import comparing
from launch.arguments import Parser
from launch.follow import run_folder, state
from megatron_lite.errors import EXIT_OK, ConfigError

DEFAULT_TOLERANCE = 1e-6


def main(argv: Sequence[str]) -> int:
    """One of COMMANDS and its arguments; returns the exit code.

    Raises:
        ConfigError: no run folder, an invalid argument, or a file that cannot be written.
    """
    return COMMANDS[argv[0]]([word for word in argv[1:] if word != "--debug"])


def report(words: Sequence[str]) -> int:
    parser = Parser(prog="python -m launch report", description="Draw a run on one page: running, ended or killed.")
    parser.add_argument("run", metavar="RUN_FOLDER")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page; report.html in the run folder if not given")
    arguments = parser.parse_args(words)
    run_dir = run_folder(arguments.run)
    # Other commands do not need what these import.
    from megatron_lite.checkpoint.folder import newest_logged
    from megatron_lite.observe.report import REPORT_FILE, write_report
    from megatron_lite.observe.run_folder import RunFolder

    try:
        print(write_report(run_dir, state(run_dir), arguments.out, RunFolder.read(run_dir, newest_logged(run_dir))))
    except OSError as error:
        raise _unwritable(arguments.out or run_dir / REPORT_FILE, error) from error
    return EXIT_OK


def compare(words: Sequence[str]) -> int:
    parser = Parser(prog="python -m launch compare", description="Where two runs part, and what can have caused it.")
    parser.add_argument("first", metavar="RUN_FOLDER")
    parser.add_argument("second", metavar="RUN_FOLDER")
    parser.add_argument("--tolerance", type=_tolerance, default=DEFAULT_TOLERANCE, help="relative; %(default)s")
    parser.add_argument("--html", type=Path, metavar="FILE", help="draw both curves and their difference as well")
    arguments = parser.parse_args(words)
    folders = (run_folder(arguments.first), run_folder(arguments.second))
    try:
        return comparing.compare(folders, (arguments.first, arguments.second), arguments.tolerance, arguments.html)
    except OSError as error:
        raise _unwritable(arguments.html, error) from error


def trace(words: Sequence[str]) -> int:
    from launch import tracing  # imports what no other command needs

    return tracing.main(words)


def _tolerance(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{word!r} must be a number >= 0")
    return value


def _unwritable(path: Path | None, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path or error.filename} cannot be written ({error.strerror}); name a file in a folder that you may write to"
    )


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"report": report, "compare": compare, "trace": trace}
