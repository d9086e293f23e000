"""Helpers for writing files: checksums, atomic and fsynced writes, a single first writer; the limit of open files; and
sizes as text."""

from __future__ import annotations

import errno
import os
import resource
import stat
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import xxhash

BLOCK_BYTES = 2**22


def file_xxh3(path: Path) -> str:
    """xxh3-128 of a whole file, in hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def bytes_below(folder: Path) -> int:
    """Total size of all files in a folder and its subfolders."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Replace a file atomically: after a kill the old or the new content is there. On disk when it returns.

    Args:
        content: the bytes, or an iterable of pieces if they do not fit in memory.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            with suppress(FileNotFoundError):  # not more widely readable than the file that it replaces
                os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode & path.stat().st_mode))
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # free the space on a full disk
            temporary.unlink()
        raise
    sync(path.parent)


def leave_only(path: Path, parts: Callable[[], Iterable[bytes]]) -> None:
    """Keep only these parts of a file's content, in their order; on disk when it returns.

    After a kill the old or the new content is there. On a full disk the parts are moved up within the file, which needs
    no space; a kill then leaves some of them twice, with one truncated line in between.

    Args:
        parts: may read the file lazily while the parts are written; called again on a full disk.
    """
    try:
        replace_file(path, parts())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        with path.open("r+b") as file:
            file.writelines(parts())
            file.truncate()
            os.fsync(file.fileno())


def make_folder(path: Path) -> None:
    """Create a folder and its parents. A file of the same name is renamed, not removed.

    Raises:
        OSError: the folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        set_aside(path)
        path.mkdir(exist_ok=True)


def set_aside(path: Path) -> None:
    """Rename an unexpected file or folder, so that people can inspect it later."""
    path.rename(path.with_name(f".{path.name}.damaged-{time.time_ns()}"))


def remove_file(path: Path) -> None:
    """Remove a file if it exists; a folder of the same name is set aside."""
    try:
        path.unlink(missing_ok=True)
    except IsADirectoryError:
        set_aside(path)
    except PermissionError:  # what macOS raises for a folder
        if not path.is_dir():
            raise
        set_aside(path)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, on disk when it returns. If the last line was truncated, a newline is added first."""
    set_aside_others(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        content = (("\n" if torn else "") + line + "\n").encode("utf-8", errors="backslashreplace")
        while content:
            content = content[os.write(descriptor, content) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def modified_ns(path: Path) -> int:
    """When a file was last written; 0 if unknown."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def set_aside_others(path: Path) -> None:
    """Set aside anything but a regular file (a folder, a pipe, a link to itself) with the name of one of our files."""
    try:
        is_other = not stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return
    except OSError:
        is_other = True
    if is_other:
        set_aside(path)


def publish_first(path: Path, text: str) -> bool:
    """Write a file atomically unless it exists. On disk when it returns.

    Returns:
        whether this process was the first of all on all nodes
    """
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # before the link: a crash must not leave an empty file under the final name
        os.link(temporary, path)  # atomic on shared filesystems, too, where O_EXCL has not always been
        sync(path.parent)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def raise_open_file_limit() -> None:
    """Raise the soft limit of open files to the hard limit: the soft limit is often 1,024 or less."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # macOS allows less than the hard limit that it reports; keep the old one
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def size_text(count: float) -> str:
    """A number of bytes as readable text, e.g. `5.25 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{_three_digits(count)} {unit}"
        count /= 1024
    return f"{_three_digits(count)} TiB"


def _three_digits(number: float) -> str:
    return f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"  # %g would write an exponent
