"""What everything that publishes files needs: a checksum, the certainty that it is on the disk, and a single writer;
how many files a process may open; and sizes in words."""

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
    """Of all files in a folder and its subfolders."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file whole, in place of what is there; a kill leaves one or the other. On the disk when it returns.

    Args:
        content: or its pieces, where it is too large for the memory.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            with suppress(FileNotFoundError):  # no wider readable than what it takes the place of
                os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode & path.stat().st_mode))
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # what a full disk took of it is room for others
            temporary.unlink()
        raise
    sync(path.parent)


def leave_only(path: Path, parts: Callable[[], Iterable[bytes]]) -> None:
    """Leave nothing in a file but these parts of what it holds, in their order; on the disk when it returns.

    A kill leaves one or the other. On a full disk the parts move up within the file, which needs no space; a kill then
    leaves some of them twice, and one line cut short where they meet.

    Args:
        parts: may read the file piece by piece as they are written, and are asked for again on a full disk.
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
    """Make a folder, and those above it. What has its name and is none is moved out of the way, not removed.

    Raises:
        OSError: the system does not let us.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        set_aside(path)
        path.mkdir(exist_ok=True)


def set_aside(path: Path) -> None:
    """Give a file or folder that is not what it should be another name, under which people can look at it."""
    path.rename(path.with_name(f".{path.name}.damaged-{time.time_ns()}"))


def remove_file(path: Path) -> None:
    """Remove a file that may be there; something else of its name is set aside."""
    try:
        path.unlink(missing_ok=True)
    except IsADirectoryError:
        set_aside(path)
    except PermissionError:  # macOS's word for the same
        if not path.is_dir():
            raise
        set_aside(path)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, on the disk when it returns. A line before it that was cut short does not swallow it."""
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
    """When a file was last written; 0 where nobody can tell."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def set_aside_others(path: Path) -> None:
    """Make way for a file of ours where something else has its name: a folder, a pipe, a link to itself."""
    try:
        is_other = not stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return
    except OSError:
        is_other = True
    if is_other:
        set_aside(path)


def publish_first(path: Path, text: str) -> bool:
    """Write a file whole or not at all, unless it is there already; whether we were the first, of all nodes.

    On the disk when it returns.
    """
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # before it has its name: a crash must not leave an empty file under it
        os.link(temporary, path)  # atomic on shared filesystems as well, where O_EXCL has not always been
        sync(path.parent)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def raise_open_file_limit() -> None:
    """Let this process open as many files as it may without asking: the soft limit is often 1,024 or less."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # macOS grants less than it says; then what there was has to do
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def size_text(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{_three_digits(count)} {unit}"
        count /= 1024
    return f"{_three_digits(count)} TiB"


def _three_digits(number: float) -> str:
    return f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"  # which %g would write with an exponent
