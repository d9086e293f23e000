"""What everything that publishes files needs: a checksum of their content, and the certainty that it is on the disk."""

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
