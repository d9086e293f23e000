"""Build a folder in one process while others wait, and make it visible only when it is complete."""

from __future__ import annotations

import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from megatron_lite.errors import DataError, remedy_of
from megatron_lite.files import sync
from megatron_lite.modes import allowed_mode, narrow

LOCKS = ".locks"
"""Folder of lock files, beside the published folders. A lock file is never removed: if another process waits for it,
both that process and a later one could hold "the" lock."""


def publish_folder(
    folder: Path,
    build: Callable[[Path], None],
    *,
    key: str,
    report: Callable[[str], None],
    marker: str,
    originals: Iterable[Path] = (),
) -> None:
    """Call `build(temporary)` and rename the temporary folder to `folder`; return at once if `folder` is complete.

    Any number of processes may call this at the same time: one builds, the others wait. The kernel releases the lock
    when its process ends, so a killed builder blocks nobody; its hidden temporary folder is removed here.

    Args:
        key: the configuration key and value of the parent folder, for messages.
        marker: a file that every complete folder contains.
        originals: files whose content the folder contains: only users who may read all of them may read the folder.
    Raises:
        DataError: the parent folder cannot be written or locked, or the disk is full.
    """
    if (folder / marker).is_file():
        return
    try:
        locks = folder.parent / LOCKS
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / folder.name)
        with locked(lock, f"another process prepares {folder}; waiting for it", report):
            if not (folder / marker).is_file():
                _build_and_rename(folder, build, originals)
    except NotImplementedError:
        raise DataError(f"{key} is on a file system without file locks; name a folder on another file system") from None
    except OSError as error:
        raise _unwritable(key, folder.parent, error) from error


def require_folder(folder: Path, key: str) -> None:
    """Create the parent of published folders, and its folder of locks. An existing parent may be read-only.

    Raises:
        DataError: it cannot be created.
    """
    try:
        (folder / LOCKS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if not folder.is_dir():
            raise _unwritable(key, folder, error) from error


def _unwritable(key: str, folder: Path, error: OSError) -> DataError:
    place = error.filename or folder
    reason = error.strerror or str(error)
    remedy = remedy_of(error, "name another folder, or free disk space")
    return DataError(f"{key} cannot be written: {place}: {reason}; {remedy}")


@contextmanager
def locked(lock: FileLock, waiting: str, report: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock during the block; report `waiting` if another process holds it."""
    try:
        lock.acquire(timeout=0.2)
    except Timeout:
        report(waiting)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build_and_rename(folder: Path, build: Callable[[Path], None], originals: Iterable[Path]) -> None:
    if folder.exists():
        raise DataError(f"{folder} is incomplete; remove it to prepare it again")
    for orphan in folder.parent.glob(f".{folder.name}.tmp-*"):  # we hold the lock, so its builder has ended
        shutil.rmtree(orphan)
    temporary = folder.parent / f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    usual = stat.S_IMODE(temporary.stat().st_mode)
    try:
        temporary.chmod(0o700)  # private until we know what others may read
        build(temporary)
        allowed = allowed_mode(originals, temporary.stat().st_gid)
        narrow(temporary, allowed)
        temporary.chmod(usual & allowed)
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        temporary.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
