"""Several processes, death in the middle, and folders that cannot be written."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lite.config.schema import RunConfig
from megatron_lite.data import publish
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.errors import DataError
from tests.unit.data.conftest import visible
from tests.unit.remedies import obeys

ConfigFor = Callable[..., RunConfig]
Silent = Callable[[str], None]
REPOSITORY = Path(__file__).resolve().parents[3]


PREPARE = """
import json, sys
from megatron_lite.config.schema import RunConfig
from megatron_lite.data.shards.prepare import prepare
config = RunConfig()
source, cache, pause = sys.argv[1:]
config.data.source, config.data.cache_dir = source, cache
config.data.tokenizer_vocab_size, config.data.validation_fraction = 410, 0.1
def report(line):
    print(line, flush=True)
    if pause == "pause" and line.startswith("tokenised"):
        import time; time.sleep(600)
print("ready", prepare(config, report=report).fingerprint, flush=True)
"""


def start(corpus: Path, cache: Path, pause: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE, str(corpus), str(cache), pause]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def wait_for_line(process: subprocess.Popen[str], beginning: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(beginning):
            return
    raise AssertionError(f"the process ended without a line {beginning!r}")


def test_two_processes_build_once(corpus: Path, tmp_path: Path) -> None:
    processes = [start(corpus, tmp_path / "cache") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("training a byte-level BPE" in output for output in outputs) == 1
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    assert len(visible(tmp_path / "cache")) == 1


def test_a_kill_in_the_middle_leaves_nothing_visible_and_blocks_no_other(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    killed = start(corpus, cache, "pause")
    wait_for_line(killed, "tokenised")
    waiting = start(corpus, cache)
    wait_for_line(waiting, "another process prepares")
    assert visible(cache) == []
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=30)
    output, _ = waiting.communicate(timeout=120)
    assert waiting.returncode == 0
    assert "ready" in output
    assert len(visible(cache)) == 1
    assert not list(cache.glob(".*tmp*"))  # the dead one's rest is gone too


def test_published_by_renaming(tmp_path: Path, silent: Silent) -> None:
    """The folder that appears is the one that was built: there is no moment at which it is half there."""
    built: list[int] = []

    def build(temporary: Path) -> None:
        built.append(temporary.stat().st_ino)
        (temporary / "marker").touch()
        assert visible(tmp_path) == []

    for _ in range(2):
        publish.publish_folder(tmp_path / "x", build, key="k", report=silent, marker="marker")
    assert built == [(tmp_path / "x").stat().st_ino]


@pytest.mark.parametrize(("modes", "file", "folder"), [
    ([0o644, 0o600], 0o600, 0o700), ([0o640, 0o644], 0o640, 0o750), ([0o444], 0o644, 0o755), ([0o604], 0o604, 0o705),
    ([], 0o644, 0o755),
])  # fmt: skip
def test_copies_are_readable_by_no_more_people_than_the_originals(
    modes: list[int], file: int, folder: int, tmp_path: Path, silent: Silent
) -> None:
    originals = [tmp_path / str(number) for number in range(len(modes))]
    for path, mode in zip(originals, modes, strict=True):
        path.touch()
        path.chmod(mode)

    def build(temporary: Path) -> None:
        assert temporary.stat().st_mode & 0o777 == 0o700
        (temporary / "tokenizer").mkdir()
        for name in ("marker", "tokenizer/tokenizer.json"):
            (temporary / name).touch()

    before = os.umask(0o022)
    try:
        publish.publish_folder(
            tmp_path / "x", build, key="k", report=silent, marker="marker", originals=[*originals, tmp_path / "gone"]
        )
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in [tmp_path / "x", *(tmp_path / "x").rglob("*")]}
    assert found == {"x": folder, "tokenizer": folder, "marker": file, "tokenizer.json": file}


def test_prepared_text_is_as_private_as_its_source(
    tmp_path: Path, corpus: Path, config_for: ConfigFor, silent: Silent
) -> None:
    corpus.chmod(0o600)
    prepare(config_for(corpus), report=silent)
    (name,) = visible(tmp_path / "cache")
    made = tmp_path / "cache" / name
    assert all(path.stat().st_mode & 0o077 == 0 for path in [made, *made.rglob("*")])


def test_prepared_text_that_is_wider_readable_than_its_source_is_narrowed(
    tmp_path: Path, corpus: Path, config_for: ConfigFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an earlier version, or of a source that has been closed since."""
    said: list[str] = []
    made = prepare(config_for(corpus), report=said.append).folder
    corpus.chmod(0o640)
    for path in [made, *made.rglob("*")]:
        path.chmod(0o755)

    def not_ours(path: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))

    with monkeypatch.context() as somebody:
        somebody.setattr(Path, "chmod", not_ours)
        said.clear()
        prepare(config_for(corpus), report=said.append)
    (warning,) = said
    assert warning.startswith(f"warning: {made} is readable by more users than its sources and tokenizer, but belongs")
    command = re.findall(r"`(chmod .*)`", warning)[0]
    assert command == f"chmod -R u=rwX,g=rX,o= {made}"
    subprocess.run(command, shell=True, check=True)
    said.clear()
    prepare(config_for(corpus), report=said.append)
    assert said == []
    corpus.chmod(0o600)
    prepare(config_for(corpus), report=said.append)
    assert said == [f"{made} was readable by more users than its sources and tokenizer; its mode is now restricted"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in [made, *made.rglob("*")])


def test_error_in_the_middle_leaves_nothing(
    tmp_path: Path, corpus: Path, config_for: ConfigFor, silent: Silent
) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(corpus.read_bytes() + b"\n\n\x00")
    with pytest.raises(DataError, match=r"bad\.txt: 1 of 121 rows are bad \(1 NUL character: "):
        prepare(config_for([corpus, bad], max_bad_fraction=0.001), report=silent)
    assert visible(tmp_path / "cache") == []
    assert not list((tmp_path / "cache").glob(".*tmp*"))


def test_full_disk(corpus: Path, config_for: ConfigFor, silent: Silent, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(publish, "sync", no_space)
    config = config_for(corpus)
    with pytest.raises(
        DataError, match=r"data\.cache_dir=.*cache cannot be written: .*: No space left on device; name"
    ):
        prepare(config, report=silent)
    assert visible(Path(config.data.cache_dir)) == []


@pytest.mark.parametrize("place", ["file", "/proc/megatron_lite"])
@obeys("megatron_lite/data/publish.py:_unwritable")
def test_cache_that_cannot_be_written(
    tmp_path: Path, corpus: Path, config_for: ConfigFor, silent: Silent, place: str
) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    cache = str(tmp_path / place / "cache")
    with pytest.raises(DataError) as error:
        prepare(config_for(corpus, cache_dir=cache), report=silent)
    assert str(error.value).startswith(f"data.cache_dir={cache} cannot be written: ")
    assert str(error.value).endswith("name another folder, or free disk space")
    assert prepare(config_for(corpus, cache_dir=str(tmp_path / "another")), report=silent).train_documents


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="must be root to become somebody else")
def test_cache_without_permission(corpus: Path, config_for: ConfigFor, silent: Silent) -> None:
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which only its owner may enter
        os.chmod(folder, 0o755)
        shutil.copy(corpus, Path(folder, "corpus.txt"))
        config = config_for(Path(folder, "corpus.txt"), cache_dir=f"{folder}/cache")
        os.seteuid(65534)
        try:
            with pytest.raises(
                DataError, match=r"data\.cache_dir=.* cannot be written: .*: Permission denied; name an"
            ):
                prepare(config, report=silent)
        finally:
            os.seteuid(0)
        assert os.listdir(folder) == ["corpus.txt"]


def test_prepared_data_is_used_from_a_cache_that_cannot_be_written(
    corpus: Path, config_for: ConfigFor, silent: Silent, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(config_for(corpus), report=silent)

    def no_lock(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(publish, "FileLock", no_lock)
    assert prepare(config_for(corpus), report=silent) == first
