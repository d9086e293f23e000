"""What is complete is found, what is not is skipped with the reason."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lite.checkpoint import folder as folders
from megatron_lite.checkpoint.folder import FileRecord, begin, candidates, content_problems, newest_complete, problem

from megatron_lite.checkpoint.folder import publish, quick_problem, read_manifest, require_space  # isort: skip
from megatron_lite.checkpoint.state import STATE_FILE, read_state
from megatron_lite.errors import CheckpointError, DiskError
from megatron_lite.files import file_xxh3
from tests.unit.checkpoint.examples import SHARD, STATE, save, write_content

DiskUsage = namedtuple("DiskUsage", "total used free")


def newest(checkpoints: Path, check=problem) -> tuple[str | None, list[str]]:
    messages: list[str] = []
    found = newest_complete(checkpoints, messages.append, check)
    return (found[0].name if found else None), messages


def test_round_trip(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", 100)
    assert folder == tmp_path / "checkpoints" / "step_00000100"
    found = newest_complete(folder.parent, pytest.fail)
    assert found is not None
    assert found == (folder, STATE)
    assert (folder.parent / "latest").read_text() == "step_00000100\n"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["latest", "step_00000100"]
    on_disk = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(read_manifest(folder)) == on_disk - {"manifest.json"}


def test_hashes_of_the_caller_are_taken(tmp_path: Path) -> None:
    temporary = begin(tmp_path, 100)
    write_content(temporary, STATE)
    size = (temporary / SHARD).stat().st_size
    folder = publish(temporary, {SHARD: FileRecord(size, "0" * 32)})
    assert read_manifest(folder)[SHARD] == FileRecord(size, "0" * 32)
    assert content_problems(folder, [STATE_FILE, SHARD]) == [f"{SHARD} has other content than the manifest says"]
    assert read_manifest(folder)[STATE_FILE].xxh3 == file_xxh3(folder / STATE_FILE)


@pytest.mark.parametrize("change", ["shorter", "gone"])
def test_file_that_is_not_as_it_was_hashed_is_not_published(change: str, tmp_path: Path) -> None:
    temporary = begin(tmp_path, 100)
    write_content(temporary, STATE)
    name = SHARD if change == "shorter" else "model-00003-of-00002.safetensors"
    with pytest.raises(CheckpointError, match=rf"step_00000100 cannot be written \({name} is (missing|[\d,]+ bytes)"):
        publish(temporary, {name: FileRecord(10**6, "0" * 32)})
    assert newest(tmp_path) == (None, ["Skipping .step_00000100.incomplete: it was never finished"])


def damage(folder: Path, fault: str) -> None:
    shard, manifest, state = folder / SHARD, folder / "manifest.json", folder / STATE_FILE
    content = shard.read_bytes()
    texts = {
        "manifest cut": (manifest, manifest.read_text()[:-9]),
        "manifest of another version": (manifest, '{"info": {"step": 2}, "files": {}}'),
        "manifest of something else": (manifest, '{"format": 1, "files": {"a": {"bytes": 1, "md5": ""}}}'),
        "manifest of words": (manifest, '{"format": 1, "files": {"config.json": {"bytes": "24", "xxh3": ""}}}'),
        "state of another version": (state, json.dumps(json.loads(state.read_text()) | {"format": 2})),
        "state of a later one": (state, state.read_text().replace("{", '{"flavour": 1, ', 1)),
    }
    if fault == "truncated":
        shard.write_bytes(content[:-1])
    elif fault == "flipped":
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif fault == "renamed":
        folder.rename(folder.with_name("step_00000300"))
    elif fault in texts:
        path, text = texts[fault]
        path.write_text(text)
    else:
        {"missing": shard, "unfinished": manifest}[fault].unlink()


FAULTS = {
    "truncated": f"{SHARD} is 87 bytes; the manifest says 88",
    "missing": f"{SHARD} is missing",
    "flipped": f"{SHARD} has other content than the manifest says",
    "unfinished": "it has no manifest.json, so it was never finished",
    "manifest cut": "manifest.json is damaged: ",
    "manifest of another version": "manifest.json has format None, but this version of megatron_lite reads format 1",
    "manifest of something else": "manifest.json is damaged: Object missing required field `xxh3`",
    "manifest of words": "manifest.json is damaged: Expected `int`, got `str` - at `$.files[...].bytes`",
    "state of another version": "FOLDER has format 2, but this version of megatron_lite reads format 1; use the",
    "state of a later one": f"FOLDER/{STATE_FILE} holds ",
    "renamed": "it holds step 200, but its name says otherwise",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_one_is_skipped_with_the_reason(fault: str, tmp_path: Path) -> None:
    save(tmp_path, 100)
    damaged = save(tmp_path, 200)
    assert newest(tmp_path) == ("step_00000200", [])
    damage(damaged, fault)
    name, messages = newest(tmp_path)
    assert name == "step_00000100"
    assert len(messages) == 2
    damaged = next(iter(candidates(tmp_path)))
    assert messages[0].startswith(f"Skipping {damaged.name}: {FAULTS[fault].replace('FOLDER', str(damaged))}")
    assert messages[1].startswith(f"{tmp_path / 'latest'} names 'step_00000200', ")


OUTSIDE = ["../../../x", "..", "/etc/passwd", "a/../../x", "a//b", "./a", "", "a\\..\\b", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_names_only_files_of_its_folder(name: str, tmp_path: Path) -> None:
    """Nothing outside is opened, and the hash of a foreign file is no sign of a whole checkpoint."""
    folder = save(tmp_path / "run" / "checkpoints", 100)
    (tmp_path / "x").write_text("secret")
    records = json.loads((folder / "manifest.json").read_text())
    records["files"][name] = {"bytes": 6, "xxh3": file_xxh3(tmp_path / "x")}
    (folder / "manifest.json").write_text(json.dumps(records))
    assert problem(folder) == (
        f"manifest.json is damaged: it names {name!r} of 6 bytes, which is not a file in its folder"
    )


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format":' * 100_000, "", "\0" * 100, '{"format": 1e999}', "\ud800"])
@pytest.mark.parametrize("name", ["manifest.json", STATE_FILE])
def test_nested_or_foreign_text_is_a_problem_and_no_traceback(name: str, text: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 100)
    (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    found = problem(folder)
    assert found is not None
    assert name in found


class Version(str):
    """As torch.__version__ is one."""


def test_a_state_may_hold_texts_of_other_classes(tmp_path: Path) -> None:
    folder = save(tmp_path, 100, replace(STATE, versions={"torch": Version("2.13.0")}))
    assert read_state(folder).versions == {"torch": "2.13.0"}


def test_a_validation_loss_without_a_number_can_be_read_again(tmp_path: Path) -> None:
    """Earlier versions wrote the word NaN, which JSON does not have."""
    folder = save(tmp_path, 100, replace(STATE, validation_loss=float("nan")))
    state = folder / STATE_FILE
    assert '"validation_loss": null,' in state.read_text()
    assert problem(folder) is None
    state.write_text(state.read_text().replace('"validation_loss": null,', '"validation_loss": NaN,'))
    assert quick_problem(folder) is not None  # of another size; what it says is read
    assert read_state(folder).validation_loss is None


def test_quick_look_reads_no_content(tmp_path: Path) -> None:
    folder = save(tmp_path, 100)
    damage(folder, "flipped")
    assert quick_problem(folder) is None
    assert problem(folder) == f"{SHARD} has other content than the manifest says"
    assert newest(tmp_path, quick_problem) == ("step_00000100", [])


def test_further_files_are_fine(tmp_path: Path) -> None:
    folder = save(tmp_path, 100)
    (folder / "README.md").write_text("My model")
    assert problem(folder) is None


@pytest.mark.parametrize(
    ("latest", "message"),
    [
        ("step_00000300", "names 'step_00000300', and there is no such checkpoint; the newest complete one is STEP"),
        ("step_00000100", "names 'step_00000100', which is older; the newest complete one is STEP"),
        ("../../etc", "names '../../etc', and there is no such checkpoint; the newest complete one is STEP"),
        ("", "names '', and there is no such checkpoint; the newest complete one is STEP"),
        ("step_00000200\n\n", None),
    ],
)
def test_latest_is_only_a_hint(latest: str, message: str | None, tmp_path: Path) -> None:
    save(tmp_path, 100)
    save(tmp_path, 200)
    (tmp_path / "latest").write_text(latest)
    expected = [f"{tmp_path / 'latest'} {message}".replace("STEP", "step_00000200")] if message else []
    assert newest(tmp_path) == ("step_00000200", expected)


def test_missing_latest_needs_no_word(tmp_path: Path) -> None:
    save(tmp_path, 100)
    (tmp_path / "latest").unlink()
    assert newest(tmp_path) == ("step_00000100", [])


def test_none_is_complete(tmp_path: Path) -> None:
    assert newest(tmp_path / "nothing") == (None, [])
    damage(save(tmp_path, 100), "missing")
    assert newest(tmp_path) == (
        None,
        [
            f"Skipping step_00000100: {SHARD} is missing",
            f"{tmp_path / 'latest'} names 'step_00000100', which is skipped; none is complete",
        ],
    )


def test_candidates_are_ordered_by_step_not_by_name(tmp_path: Path) -> None:
    for name in ("step_100000000", "step_99999999", "step_00000100", "step_x", ".step_00000200.incomplete"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000300").write_text("a file")
    assert [folder.name for folder in candidates(tmp_path)] == ["step_100000000", "step_99999999", "step_00000100"]


def test_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 100)
    (save(tmp_path, 200) / SHARD).unlink()
    save(tmp_path, 200)
    assert newest(tmp_path) == ("step_00000200", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000100", "step_00000200"]


def test_no_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"  # not there yet
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(0, 0, 3 * 2**30 if path == tmp_path else 0))
    require_space(checkpoints, 3 * 2**30)
    with pytest.raises(DiskError) as caught:
        require_space(checkpoints, 21 * 2**28)
    assert str(caught.value) == (
        f"{checkpoints} needs 5.25 GiB for a checkpoint, but its disk has 3 GiB free; free some space, keep fewer with "
        f"train.keep_last (`python -m megatron_lite.checkpoint prune {checkpoints} --keep-last N` removes the others "
        "now), or move the run folder to another disk and name it in train.run_dir"
    )
    assert list(tmp_path.iterdir()) == []


def test_leftovers_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftover = begin(tmp_path, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(0, 0, 0 if leftover.exists() else 100))
    require_space(tmp_path, 100)
    assert not leftover.exists()


@pytest.mark.parametrize("call", ["begin", "publish"])
def test_what_the_system_refuses_is_one_clear_error(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 100)
    temporary = begin(tmp_path, 200)
    write_content(temporary, STATE)

    def refuse(*arguments: object, **named: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(os, "mkdir" if call == "begin" else "fsync", refuse)
    with pytest.raises(CheckpointError, match=r"step_00000200 cannot be written .*Permission denied.* free some space"):
        begin(tmp_path, 200) if call == "begin" else publish(temporary, {})
    assert newest(tmp_path)[0] == "step_00000100"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to give up root to lose permissions")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (SHARD, f"{SHARD} cannot be read (Permission denied)"),
        ("manifest.json", "FOLDER/manifest.json cannot be read: Permission denied"),
        ("training", "FOLDER/training/state.json cannot be read: Permission denied"),
    ],
)
def test_unreadable_file_is_a_problem_and_no_traceback(name: str, expected: str, tmp_path: Path) -> None:
    """Root may read everything, so a child that is nobody looks."""
    folder = save(tmp_path, 100)
    for parent in (tmp_path, *list(tmp_path.parents)[:3]):
        parent.chmod(0o755)
    for path in folder.glob("*.safetensors"):  # that library writes for the owner alone
        path.chmod(0o644)
    (folder / name).chmod(0)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        os.write(write_end, str(problem(folder)).encode())
        os._exit(0)
    os.close(write_end)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert os.read(read_end, 4096).decode().startswith(expected.replace("FOLDER", str(folder)))
    os.close(read_end)


def test_nothing_needs_torch() -> None:
    source = Path(folders.__file__).read_text()
    assert not re.search(r"^\s*(import|from) torch", source, re.MULTILINE)
