"""What a corpus holds is read once, by one process, and then known by each file's size, time and inode."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.corpus import digests
from megatron_lite.data.corpus.digests import MEMORY_FILE, remembered_digests
from megatron_lite.data.shards.prepare import prepare, prepared_folder
from tests.unit.data.conftest import visible

ConfigFor = Callable[..., RunConfig]
Silent = Callable[[str], None]
REPOSITORY = Path(__file__).resolve().parents[4]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read, in order."""
    found: list[str] = []
    original = digests._Memory._read_file

    def counted(self: digests._Memory, name: str) -> digests.Entry:
        found.append(Path(name).name)
        return original(self, name)

    monkeypatch.setattr(digests._Memory, "_read_file", counted)
    return found


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Five of an hour ago."""
    paths = [tmp_path / f"{letter}.txt" for letter in "abcde"]
    for path in paths:
        path.write_text(f"text of {path.name}")
        settle(path)
    (tmp_path / "cache").mkdir()
    return paths


def settle(path: Path, seconds_ago: int = 3600) -> None:
    now = path.stat().st_mtime_ns
    os.utime(path, ns=(now, now - seconds_ago * 10**9))


def ask(files: list[Path], report: Callable[[str], None] = lambda line: None) -> list[list[object]]:
    with remembered_digests(files[0].parent / "cache", report) as identity:
        return [identity(path) for path in files]


def test_only_what_has_changed_is_read_again(files: list[Path], read: list[str]) -> None:
    first = ask(files)
    assert read == ["a.txt", "b.txt", "c.txt", "d.txt", "e.txt"]
    read.clear()
    assert ask(files) == first
    assert read == []
    files[2].write_text("Text of c.txt")  # as long as before
    settle(files[2], 60)
    second = ask(files)
    assert read == ["c.txt"]
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, True, False, True, True]


@pytest.mark.parametrize("change", ["size", "time", "inode"])
def test_each_of_size_time_and_inode_counts(files: list[Path], read: list[str], change: str) -> None:
    ask(files)
    read.clear()
    stat = files[0].stat()
    if change == "inode":
        shutil.copy(files[0], files[0].with_suffix(".new"))
        os.replace(files[0].with_suffix(".new"), files[0])
    elif change == "size":
        files[0].write_text("longer than it has been")
    if change == "time":
        os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    else:
        os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    ask(files)
    assert read == ["a.txt"]


@pytest.mark.parametrize("later", ["process", "boot", "system without a record"])
def test_a_file_of_this_moment_is_not_trusted(
    files: list[Path], read: list[str], later: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may change again within the same tick of the file system's clock."""
    files[0].touch()
    if later == "system without a record":
        monkeypatch.setattr(digests, "boot", lambda: "")
    ask(files)
    read.clear()
    if later == "process":
        began_ns = time.clock_gettime_ns(digests.CLOCK)
        monkeypatch.setattr(digests, "process_began_ns", lambda: began_ns)
    elif later == "boot":
        monkeypatch.setattr(digests, "boot", lambda: "another")
    ask(files)
    assert read == ["a.txt"]
    settle(files[0], 10)
    ask(files)
    read.clear()
    ask(files)
    assert read == []


def test_other_spellings_of_a_file_share_what_is_known(files: list[Path], tmp_path: Path, read: list[str]) -> None:
    (tmp_path / "link.txt").symlink_to(files[0])
    known = ask(files)[0]
    read.clear()
    with remembered_digests(tmp_path / "cache", lambda line: None) as identity:
        for spelling in (tmp_path / "." / "a.txt", tmp_path / "cache" / ".." / "a.txt", tmp_path / "link.txt"):
            assert identity(spelling) == known
    assert read == []
    shutil.copy(files[0], tmp_path / "moved.txt")
    assert ask([tmp_path / "moved.txt"]) == [known]


def test_a_start_reads_no_file_of_an_unchanged_corpus(
    corpus: Path, config_for: ConfigFor, silent: Silent, read: list[str]
) -> None:
    settle(corpus)
    first = prepare(config_for(corpus), report=silent)
    assert read == ["corpus.txt"]
    assert prepare(config_for(corpus), report=silent) == first
    assert prepared_folder(config_for(corpus)) == first.folder
    assert read == ["corpus.txt"]
    assert visible(first.folder.parent) == [first.folder.name]


RANK = """
import sys
from pathlib import Path
from megatron_lite.data.corpus import digests
original = digests._Memory._read_file
def counted(self, name):
    print("read", flush=True)
    return original(self, name)
digests._Memory._read_file = counted
folder = Path(sys.argv[1])
sys.stdin.readline()
with digests.remembered_digests(folder / "cache", lambda line: None) as identity:
    print(*(identity(path)[1] for path in sorted(folder.glob("*.txt"))), flush=True)
"""


def test_of_processes_that_start_together_one_reads(files: list[Path]) -> None:
    """Of a corpus of an hour ago, and of one that has just been written."""
    for path in files:
        path.write_bytes(random.Random(path.name).randbytes(2**22))
    for path in files[:3]:
        settle(path)
    command = [sys.executable, "-c", RANK, str(files[0].parent)]
    ranks = [subprocess.Popen(command, cwd=REPOSITORY, stdin=-1, stdout=-1, text=True) for _ in range(3)]
    for path in files[3:]:
        path.touch()
    for rank in ranks:
        assert rank.stdin is not None
        rank.stdin.write("\n")
        rank.stdin.flush()
    lines = [rank.communicate(timeout=120)[0].splitlines() for rank in ranks]
    assert sum(found.count("read") for found in lines) == len(files)
    assert len({found[-1] for found in lines}) == 1


def test_reading_that_takes_time_says_so(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    ask(files[:3], said.append)
    assert said == []  # nothing that is over at once
    monkeypatch.setattr(digests, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(digests, "REPORT_SECONDS", 0.0)
    ask(files, said.append)
    assert [line.partition(" so far, now ")[0] for line in said] == [
        "reading what is new in the corpus: 13 B",
        "reading what is new in the corpus: 26 B",
    ]
    assert said[-1].endswith("e.txt")


@pytest.mark.parametrize("damage", ["flip", "cut", "zero", "foreign", "empty", "folder", "nested"])
def test_a_damaged_memory_costs_a_warning_and_the_reading(files: list[Path], read: list[str], damage: str) -> None:
    first = ask(files)
    path = files[0].parent / "cache" / MEMORY_FILE
    content = path.read_bytes()
    place = content.index(str(first[0][1]).encode())  # a digit of a checksum: still JSON, and wrong
    flipped = b"0" if content[place : place + 1] != b"0" else b"1"
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes(
            {
                "flip": content[:place] + flipped + content[place + 1 :],
                "cut": content[: len(content) // 2],
                "zero": bytes(len(content)),
                "foreign": b'{"format": 3, "files": [1, 2]}',
                "empty": b"",
                "nested": b"[" * 100_000,
            }[damage]
        )
    read.clear()
    said: list[str] = []
    assert ask(files, said.append) == first
    assert len(read) == len(files)
    (line,) = said
    assert line.startswith(f"warning: {path}")
    assert line.endswith("all files are read again")


def test_asking_where_data_would_lie_makes_no_folder(corpus: Path, config_for: ConfigFor) -> None:
    assert not prepared_folder(config_for(corpus)).parent.exists()


def test_what_is_gone_is_forgotten(files: list[Path]) -> None:
    ask(files)
    files[0].unlink()
    files[1].write_text("other")
    settle(files[1])
    ask(files[1:])
    content = (files[1].parent / "cache" / MEMORY_FILE).read_text()
    assert "a.txt" not in content
    assert "b.txt" in content
