"""Cached checksums of the files of a corpus, so that a run reads only files that have changed since the last run.

The cache is a file in data.cache_dir. An entry is valid while the file at its path keeps its size, modification time
and inode. A file that was modified within the last two seconds is read again next time, because another change within
the same tick of the file system's clock would alter none of these (git calls this a racy index). Only processes on the
same node that started before the file was read, such as the other ranks of a job, reuse such an entry. One process
reads under a lock; the others wait and use its results. Losing or damaging the cache costs only time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import xxhash
from filelock import FileLock

from megatron_lite.data.publish import LOCKS, locked
from megatron_lite.data.sealed import read_sealed, sealed
from megatron_lite.errors import DamagedFileError
from megatron_lite.files import BLOCK_BYTES, replace_file, size_text

MEMORY_FILE = f"{LOCKS}/digests.json"  # in data.cache_dir, hidden so that users see only prepared folders there
LOCK_FILE = f"{LOCKS}/digests"
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # the clock of /proc
SETTLED_NS = 2 * 10**9  # the coarsest file system clock in use (FAT) ticks every two seconds
QUIET_SECONDS = 3.0  # seconds of reading before the first progress line
REPORT_SECONDS = 10.0

Identity = list[Any]
"""Size in bytes and checksum: equal for equal content."""


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """Cached facts of one file."""

    size: int
    mtime_ns: int
    inode: int
    digest: str
    read_ns: int = 0
    """For a file that had just been modified: when it was read, since the boot of the node. 0 = valid for everybody."""
    boot: str = ""
    """The boot id of the node that read it."""

    def describes(self, stat: os.stat_result) -> bool:
        return (self.size, self.mtime_ns, self.inode) == (stat.st_size, stat.st_mtime_ns, stat.st_ino)


def boot() -> str:
    """The boot id of this node; empty if the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def process_began_ns() -> int:
    """When this process started or was forked, since the boot of the node. Called only if `boot` is known."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # the process name may hold any character
    return int(fields[19]) * 10**9 // os.sysconf("SC_CLK_TCK")


@contextmanager
def remembered_digests(cache_dir: Path, report: Callable[[str], None]) -> Iterator[Callable[[Path], Identity]]:
    """Context manager that gives a function from a file to its identity.

    If cache_dir cannot be written, nothing new is cached.

    Args:
        report: called with a line while reading takes long, and if the cache file is damaged.
    """
    memory = _Memory(cache_dir, report)
    try:
        yield memory.identity
    finally:
        memory.close()


class _Memory:
    def __init__(self, cache_dir: Path, report: Callable[[str], None]) -> None:
        self._cache_dir = cache_dir
        self._path = cache_dir / MEMORY_FILE
        self._report = report
        self._entries = self._read(report)
        self._locked: ExitStack | None = None  # taken when the first file has to be read
        self._is_saved = True
        self._bytes_read = 0
        self._next_line = 0.0

    def identity(self, path: Path) -> Identity:
        name = os.path.realpath(path)
        entry = self._known(name)
        if entry is None and self._locked is None:
            self._lock()
            entry = self._known(name)  # the process that we waited for may have read it
        if entry is None:
            entry = self._read_file(name)
        return [entry.size, entry.digest]

    def close(self) -> None:
        if self._locked is not None:
            with self._locked:
                self._save()

    def _known(self, name: str) -> Entry | None:
        entry = self._entries.get(name)
        if entry is None or not entry.describes(os.stat(name)):
            return None
        return entry if not entry.read_ns or (entry.boot == boot() and process_began_ns() <= entry.read_ns) else None

    def _lock(self) -> None:
        self._locked = ExitStack()
        self._next_line = time.monotonic() + QUIET_SECONDS
        if not self._cache_dir.is_dir():  # a caller that only asks for the path of the data creates no folders
            return
        with suppress(OSError, NotImplementedError):  # read-only folder, or no file locks: read without a lock
            lock = FileLock(self._cache_dir / LOCK_FILE)
            self._locked.enter_context(locked(lock, "another process reads the corpus; waiting for it", self._report))
        self._entries = self._read(lambda line: None)  # damage was reported by the first read

    def _read_file(self, name: str) -> Entry:
        digest = xxhash.xxh3_128()
        began_ns, since_boot_ns = time.time_ns(), time.clock_gettime_ns(CLOCK)
        with open(name, "rb") as file:
            stat = os.fstat(file.fileno())
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                self._bytes_read += len(block)
                self._tell(name)
            after = os.fstat(file.fileno())
        is_settled = stat.st_mtime_ns + SETTLED_NS <= began_ns
        when = () if is_settled else (since_boot_ns, boot())
        entry = Entry(stat.st_size, stat.st_mtime_ns, stat.st_ino, digest.hexdigest(), *when)
        if entry.describes(after) and (is_settled or entry.boot):
            self._entries[name] = entry
            self._is_saved = False
        return entry

    def _tell(self, name: str) -> None:
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + REPORT_SECONDS
            self._report(f"reading what is new in the corpus: {size_text(self._bytes_read)} so far, now {name}")
            self._save()  # a killed process loses only the file that it is reading

    def _read(self, report: Callable[[str], None]) -> dict[str, Entry]:
        try:
            content = read_sealed(self._path) or {}
            return msgspec.convert(content, dict[str, Entry])
        except (DamagedFileError, msgspec.ValidationError) as error:
            report(f"warning: {error}; it only caches checksums, so all files are read again")
            return {}

    def _save(self) -> None:
        if self._is_saved:
            return
        there = {name: entry for name, entry in self._entries.items() if os.path.exists(name)}
        with suppress(OSError):  # read-only folder, or full disk: the files are read again next time
            replace_file(self._path, sealed(msgspec.to_builtins(there)))
            self._is_saved = True
