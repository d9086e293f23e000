"""What everything that publishes files needs: a checksum, the certainty that it is on the disk, and a single writer;
and sizes in words."""

from __future__ import annotations

import os
from collections.abc import Iterable
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
    with temporary.open("wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


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


def size_text(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{_three_digits(count)} {unit}"
        count /= 1024
    return f"{_three_digits(count)} TiB"


def _three_digits(number: float) -> str:
    return f"{number:.3g}" if number < 999.5 else f"{number:,.0f}"  # which %g would write with an exponent
