"""What everything that publishes files needs: a checksum, the certainty that it is on the disk, and a single writer."""

from __future__ import annotations

import os
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


def sync(path: Path) -> None:
    """Force a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_first(path: Path, text: str) -> bool:
    """Write a file whole or not at all, unless it is there already; whether we were the first, of all nodes."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        os.link(temporary, path)  # atomic on shared filesystems as well, where O_EXCL has not always been
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True
