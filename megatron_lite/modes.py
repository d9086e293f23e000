"""File permissions: a file that repeats content of other files must not be more widely readable than any of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OWNER, GROUP, OTHERS = 0o700, 0o070, 0o007


def allowed_mode(originals: Iterable[Path], group: int) -> int:
    """The widest mode of a file that repeats content of the originals: only users who may read all of them may read it.

    Args:
        group: the group of that file. For originals of another group, the permissions of others count.
    """
    allowed = OWNER | GROUP | OTHERS
    for path in originals:
        with suppress(OSError):  # removed meanwhile
            found = path.stat()
            if not found.st_mode & stat.S_IROTH:
                allowed &= ~OTHERS
                if found.st_gid != group:
                    allowed &= ~GROUP
            if not found.st_mode & stat.S_IRGRP:
                allowed &= ~GROUP
    return allowed


def narrow(root: Path, allowed: int) -> bool:
    """Remove permissions beyond a mode from a file, or from a folder and everything in it.

    Returns:
        whether any permission was removed
    Raises:
        PermissionError: the file belongs to another user.
    """
    was_wider = False
    for path in [root, *root.rglob("*")]:
        with suppress(FileNotFoundError):  # another process has removed it meanwhile
            mode = path.lstat().st_mode
            if not stat.S_ISLNK(mode) and mode & (GROUP | OTHERS) & ~allowed:
                path.chmod(stat.S_IMODE(mode) & ~((GROUP | OTHERS) & ~allowed))
                was_wider = True
    return was_wider


def mask(allowed: int) -> int:
    """Limit the mode of all files that this process and its children create from now on; returns the umask before."""
    before = os.umask(GROUP | OTHERS)
    os.umask(before | (GROUP | OTHERS) & ~allowed)
    return before


@contextmanager
def masked(originals: Iterable[Path], folder: Path) -> Iterator[None]:
    """Within the block, files that this process creates in a folder are not more widely readable than the originals."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    before = mask(allowed_mode(originals, parent.stat().st_gid))
    try:
        yield
    finally:
        os.umask(before)


def keep_private(run_dir: Path, data: Path, log: Path | None, *, is_writer: bool) -> None:
    """Make a run's files no more widely readable than its data: logs, spike reports, report and tokenizer repeat it.

    Applies to its log and all files that this process writes from now on; the writing rank also fixes existing files.
    """
    allowed = allowed_mode([data], run_dir.stat().st_gid)
    mask(allowed)
    for path in (log, run_dir if is_writer else None):
        if path is not None:
            with suppress(OSError):  # another user's folder, or a filesystem without modes
                narrow(path, allowed)
