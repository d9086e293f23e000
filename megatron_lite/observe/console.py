"""One terminal for the whole job, one log file for each rank.

Libraries print from Python, from C++ and from child processes, once per rank. So the redirection happens at the level
of file descriptors: 1 and 2 of every rank go to `<run>/logs/rank-N.log`, and output for the user goes through a
`Console`, which holds duplicates of the original descriptors.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console as RichConsole
from rich.console import RenderableType

from megatron_lite.errors import DISK_ERRNOS, ConfigError
from megatron_lite.files import make_folder, set_aside_others
from megatron_lite.observe.credentials import redacted

_STDOUT, _STDERR = 1, 2


class Forgiving(io.TextIOBase):
    """A text file over a descriptor whose failed writes raise no error.

    Neither a closed SSH session or `| head` nor a full disk may end a run of days: output that cannot be written is
    lost, and if the reader is gone, so is all later output.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._gone = False
        self._lost_bytes = 0

    def write(self, text: str) -> int:
        data = redacted(text).encode("utf-8", errors="replace")
        if self._lost_bytes and not self._gone:
            data = f"\n--- {self._lost_bytes} bytes could not be written here ---\n".encode() + data
        while data and not self._gone:
            try:
                data = data[os.write(self._descriptor, data) :]
                self._lost_bytes = 0
            except OSError as error:
                self._gone = error.errno not in DISK_ERRNOS
                self._lost_bytes += len(data)
                break
        return len(text)

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"


class Console:
    """Output of one rank for the user: `print` on rank 0 only, `error` on every rank.

    Args:
        output: where `print` writes; None = nowhere.
        errors: where `error` writes.
        label: prefix of errors that names the rank; may be empty.
    """

    def __init__(self, output: TextIO | None, errors: TextIO, label: str = "", log_path: Path | None = None) -> None:
        self.log_path = log_path
        self._label = label
        self.rich = _rich(output) if output is not None else None
        self._errors = _rich(errors)

    @property
    def is_terminal(self) -> bool:
        """Whether `print` writes to a terminal that can show a progress bar."""
        return self.rich is not None and self.rich.is_terminal and not self.rich.is_dumb_terminal

    def print(self, message: RenderableType = "") -> None:
        """Show a line or a rich renderable to the user; does nothing on ranks other than 0."""
        if self.rich is not None:
            _show(self.rich, message)

    def error(self, message: RenderableType, *, own: bool = True) -> None:
        """Show an error on the original stderr, from any rank, and keep it in the rank's log.

        Args:
            own: the error is about this rank, which is named; else it is about the whole job.
        """
        if isinstance(message, str) and self._label and own:
            message = f"{self._label}: {message}"
        _show(self._errors, message)
        if self.log_path is not None and isinstance(message, str):
            print(message, file=sys.stderr, flush=True)

    def release(self) -> None:
        """Restore the terminal, from any thread, before the process exits without cleanup."""
        if self.rich is not None and self.is_terminal:
            self.rich.show_cursor()  # a progress bar has hidden it

    def restore(self) -> None:
        """Undo `redirect_output`; does nothing for other consoles."""


class _RedirectedConsole(Console):
    """A console that owns the saved descriptors of a redirected process."""

    def __init__(
        self, saved_stdout: int, saved_stderr: int, log_path: Path, rank: int, streams: tuple[TextIO, TextIO]
    ) -> None:
        self._streams = streams
        self._saved: tuple[int, int] | None = (saved_stdout, saved_stderr)
        output = cast(TextIO, Forgiving(saved_stdout)) if rank == 0 else None
        label = "" if rank == 0 else f"rank {rank}"
        super().__init__(output, cast(TextIO, Forgiving(saved_stderr)), label, log_path)

    def restore(self) -> None:
        if self._saved is None:
            return
        _flush()
        for saved, target in zip(self._saved, (_STDOUT, _STDERR), strict=True):
            os.dup2(saved, target)
            os.close(saved)
        self._saved = None
        sys.stdout, sys.stderr = self._streams
        self.rich = None
        self._errors = _rich(sys.stderr)


def redirect_output(run_dir: Path, rank: int) -> Console:
    """Append everything that this process prints from now on to `<run_dir>/logs/rank-<rank>.log`.

    Call it before importing libraries that print. Child processes inherit the redirection.

    Returns:
        The console over the original stdout (rank 0) and stderr (all ranks); its `restore` undoes the redirection.
    Raises:
        ConfigError: the log cannot be written.
    """
    log_path = Path(run_dir) / "logs" / f"rank-{rank}.log"
    try:
        make_folder(log_path.parent)
        set_aside_others(log_path)
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise ConfigError(
            f"train.run_dir={run_dir} cannot be written ({error.strerror}: {error.filename}); "
            "choose a folder of your own"
        ) from error
    _flush()
    saved_stdout, saved_stderr = os.dup(_STDOUT), os.dup(_STDERR)
    os.dup2(log, _STDOUT)
    os.dup2(log, _STDERR)
    os.close(log)
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # libraries may hold a reference to it
    forgive_output()
    print(f"--- {datetime.now().isoformat(timespec='seconds')} rank {rank} starts, process {os.getpid()} ---")
    return _RedirectedConsole(saved_stdout, saved_stderr, log_path, rank, streams)


def forgive_output() -> None:
    """Make `print` of this process never fail, even if its terminal is closed or the disk of its log is full.

    Nothing is buffered, so the last output of a killed process is not lost.
    """
    _flush()
    sys.stdout, sys.stderr = cast(TextIO, Forgiving(_STDOUT)), cast(TextIO, Forgiving(_STDERR))


def _rich(file: TextIO) -> RichConsole:
    # Without force_terminal a FORCE_COLOR in the environment would put the moving bar into files and pipes.
    return RichConsole(
        file=file,
        force_terminal=file.isatty(),
        width=_hidden_width(file),
        highlight=False,
        emoji=False,
        markup=False,
    )


def _hidden_width(file: TextIO) -> int | None:
    """Width of a terminal that rich cannot detect: it checks descriptors 0 to 2, but 1 and 2 are the log now."""
    with contextlib.suppress(OSError, ValueError):
        if not os.isatty(0) and os.isatty(file.fileno()):
            return os.get_terminal_size(file.fileno()).columns or None  # some containers' terminals have size 0
    return None


def _show(console: RichConsole, message: Any) -> None:
    if isinstance(message, str):
        console.print(message, soft_wrap=True)  # a file or pipe has no width to wrap a line at
    else:
        console.print(message)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
