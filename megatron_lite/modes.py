"""Who may read what: a file that repeats the content of others is no wider readable than each of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OWNER, GROUP, OTHERS = 0o700, 0o070, 0o007


def allowed_mode(originals: Iterable[Path], group: int) -> int:
    """The widest mode of a file that repeats what is in the originals: whoever may not read all may not read it.

    Args:
        group: of that file. Of originals of another group it counts what everybody may do.
    """
    allowed = OWNER | GROUP | OTHERS
    for path in originals:
        with suppress(OSError):  # gone since
            found = path.stat()
            if not found.st_mode & stat.S_IROTH:
                allowed &= ~OTHERS
                if found.st_gid != group:
                    allowed &= ~GROUP
            if not found.st_mode & stat.S_IRGRP:
                allowed &= ~GROUP
    return allowed


def narrow(root: Path, allowed: int) -> bool:
    """Take what goes beyond a mode from a file, or a folder and all that is in it; whether anything did.

    Raises:
        PermissionError: it is somebody else's.
    """
    was_wider = False
    for path in [root, *root.rglob("*")]:
        with suppress(FileNotFoundError):  # of another process: gone since
            mode = path.lstat().st_mode
            if not stat.S_ISLNK(mode) and mode & (GROUP | OTHERS) & ~allowed:
                path.chmod(stat.S_IMODE(mode) & ~((GROUP | OTHERS) & ~allowed))
                was_wider = True
    return was_wider


def mask(allowed: int) -> int:
    """Let no file that this process, or one that it starts, makes from now on be wider; the umask that was before."""
    before = os.umask(GROUP | OTHERS)
    os.umask(before | (GROUP | OTHERS) & ~allowed)
    return before


@contextmanager
def masked(originals: Iterable[Path], folder: Path) -> Iterator[None]:
    """For the length of the block, no file that this process makes in a folder is wider readable than the originals."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    before = mask(allowed_mode(originals, parent.stat().st_gid))
    try:
        yield
    finally:
        os.umask(before)


def keep_private(run_dir: Path, data: Path, log: Path | None, *, is_writer: bool) -> None:
    """Let a run's files be no wider readable than its data: logs, dossiers, report and tokenizer repeat parts of it.

    Holds for all that this process writes from now on, and its log; the writing rank narrows what else is there.
    """
    allowed = allowed_mode([data], run_dir.stat().st_gid)
    mask(allowed)
    for path in (log, run_dir if is_writer else None):
        if path is not None:
            with suppress(OSError):  # somebody else's folder, or a file system without modes
                narrow(path, allowed)
