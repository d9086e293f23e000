"""The embedded corpus: the running interpreter's own standard library, and Python's reference topics.

This is real text that every machine with Python already has: about 730 modules and 80 topics, 12 MB. Tests, generated
files and installed packages are left out.
"""

from __future__ import annotations

import importlib
import io
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

import xxhash

from megatron_lite.errors import DataError

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TOPICS_MODULE = "pydoc_data.topics"
TOPICS_FILE = Path("pydoc_data", "topics.py")  # its topics are documents, so it is not read as source as well


def embedded_files() -> list[Path]:
    """The source files, sorted by their path inside the library.

    Raises:
        DataError: this interpreter comes without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not _is_skipped(name))
        files += [Path(folder, name) for name in sorted(names) if name.endswith(".py") and not _is_generated(name)]
    files = [path for path in files if path.relative_to(root) != TOPICS_FILE]
    if not files:
        raise DataError(f"data.source=embedded finds no .py file under {root}; name your own text in data.source")
    return files


def embedded_documents() -> Iterator[tuple[str, int, int]]:
    """Every source file as one document, then every topic: text, place in `embedded_names`, number in that file."""
    files = embedded_files()
    for i, path in enumerate(files):
        yield _decode_source(path.read_bytes()), i, 0
    for number, topic in enumerate(_topics()):
        yield topic, len(files), number


def embedded_names() -> tuple[str, ...]:
    """The source files, and the file of the topics."""
    return (*map(str, embedded_files()), str(Path(sysconfig.get_path("stdlib")) / TOPICS_FILE))


def embedded_digest() -> str:
    """Checksum of the corpus: another version of Python is another corpus."""
    root = Path(sysconfig.get_path("stdlib"))
    digest = xxhash.xxh3_128()
    for path in embedded_files():
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    topics = root / TOPICS_FILE
    if topics.is_file():
        digest.update(topics.read_bytes())
    return digest.hexdigest()


def _is_skipped(folder: str) -> bool:
    return folder in SKIPPED_FOLDERS or folder.startswith("config-")


def _is_generated(name: str) -> bool:
    return name.startswith("_sysconfigdata")  # holds paths of the machine that built this Python


def _topics() -> list[str]:
    try:
        module = importlib.import_module(TOPICS_MODULE)
    except ImportError:  # some distributions package it separately; the sources alone are enough
        return []
    return [module.topics[name] for name in sorted(module.topics)]


def _decode_source(content: bytes) -> str:
    """Text of a Python file, by its encoding declaration where it is not UTF-8 (PEP 263)."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return content.decode(encoding, errors="replace")
