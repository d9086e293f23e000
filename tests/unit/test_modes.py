"""What repeats the content of files is not a wider readable than they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_lite.files import replace_file
from megatron_lite.modes import allowed_mode, keep_private, masked, narrow


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def made(path: Path, mode: int) -> Path:
    path.touch()
    path.chmod(mode)
    return path


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(
    ("modes", "allowed"),
    [
        ([0o644, 0o600], 0o700), ([0o640, 0o644], 0o770), ([0o444], 0o777), ([0o604], 0o707), ([], 0o777),
        ([0o640, 0o604], 0o700), ([0o711], 0o700),
    ],
)  # fmt: skip
def test_who_may_read_all_originals(modes: list[int], allowed: int, tmp_path: Path) -> None:
    originals = [made(tmp_path / str(number), mode) for number, mode in enumerate(modes)]
    group = tmp_path.stat().st_gid
    assert allowed_mode([*originals, tmp_path / "gone"], group) == allowed
    of_others = 0o777 if allowed & 0o7 and allowed & 0o70 else 0o700 | allowed & 0o7
    assert allowed_mode(originals, group + 1) == of_others, "another group is not the one that may read them"


def test_narrowing_takes_and_never_gives(tmp_path: Path) -> None:
    (tmp_path / "run" / "deep").mkdir(parents=True)
    (tmp_path / "run" / "link").symlink_to(made(tmp_path / "elsewhere", 0o644))
    files = {made(tmp_path / "run" / name, mode): mode for name, mode in (("a", 0o664), ("deep/b", 0o400))}
    assert narrow(tmp_path / "run", 0o770)
    assert {path: mode_of(path) for path in files} == {path: mode & 0o770 for path, mode in files.items()}
    assert [mode_of(path) for path in (tmp_path / "run", tmp_path / "run" / "deep")] == [0o750, 0o750]
    assert mode_of(tmp_path / "elsewhere") == 0o644
    assert not narrow(tmp_path / "run", 0o770)


def test_files_of_a_block_are_no_wider_than_the_originals(tmp_path: Path) -> None:
    with masked([made(tmp_path / "private", 0o600)], tmp_path / "not" / "there" / "yet"):
        (tmp_path / "not" / "there").mkdir(parents=True)
        (tmp_path / "not" / "there" / "a").touch()
    assert [mode_of(path) for path in (tmp_path / "not", tmp_path / "not" / "there" / "a")] == [0o700, 0o600]
    (tmp_path / "after").touch()
    assert mode_of(tmp_path / "after") == 0o644


def test_a_run_folder_is_as_private_as_its_data(tmp_path: Path) -> None:
    for name in ("data", "run"):
        (tmp_path / name).mkdir()
    log, own_log = (made(tmp_path / "run" / name, 0o644) for name in ("log", "own"))
    keep_private(tmp_path / "run", tmp_path / "data", None, is_writer=True)
    (tmp_path / "run" / "open").touch()
    assert (mode_of(log), mode_of(tmp_path / "run" / "open")) == (0o644, 0o644)
    (tmp_path / "data").chmod(0o700)
    keep_private(tmp_path / "run", tmp_path / "data", own_log, is_writer=False)
    assert (mode_of(log), mode_of(own_log)) == (0o644, 0o600), "one of many ranks does the rest"
    keep_private(tmp_path / "run", tmp_path / "data", None, is_writer=True)
    (tmp_path / "run" / "closed").touch()
    assert [mode_of(path) for path in (tmp_path / "run", log, tmp_path / "run" / "closed")] == [0o700, 0o600, 0o600]


def test_a_replaced_file_stays_as_private_as_it_was(tmp_path: Path) -> None:
    replace_file(made(tmp_path / "closed", 0o600), b"new")
    replace_file(tmp_path / "new", b"new")
    assert (mode_of(tmp_path / "closed"), mode_of(tmp_path / "new")) == (0o600, 0o644)
