"""Checkpoint folders that are complete or invisible, even if the process that writes them is killed. Needs no torch.

`checkpoints/step_00000100` appears by one rename when everything in it is on the disk, including `manifest.json` with
the size and hash of each file. Folders with other names are not checkpoints: `.step_00000100.incomplete` is being
written, `.removing` is being removed, `.replaced` was moved aside for a new save of the same step. The text file
`latest` beside them names the newest folder for people and tools; a resume finds the newest complete folder itself.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_lite.checkpoint.state import CheckpointState, Format, read_state, require_format
from megatron_lite.errors import DISK_ERRNOS, CheckpointError, DamagedFileError, DiskError, ForeignFormatError
from megatron_lite.files import file_xxh3, size_text, sync
from megatron_lite.observe.logged import LoggedLines
from megatron_lite.state_files import decode, read_bytes

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
NAME = re.compile(r"step_(\d+)")
REPLACED = re.compile(r"\.step_(\d+)\.replaced")


@dataclass(frozen=True)
class FileRecord:
    """The entry of a file in the manifest."""

    bytes: int
    xxh3: str  # xxh3-128 of the content, in hexadecimal digits


@dataclass(frozen=True)
class _Manifest:
    files: dict[str, FileRecord]


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def begin(checkpoints: Path, step: int) -> Path:
    """Create the temporary folder that `publish` turns into the checkpoint of this step. Only for the writing rank.

    First removes leftovers of killed saves and removals.

    Raises:
        CheckpointError: the folder cannot be created.
    """
    temporary = checkpoints / f".{folder_name(step)}.incomplete"
    with explained(checkpoints / folder_name(step)):
        remove_leftovers(checkpoints)
        temporary.mkdir(parents=True)
    return temporary


def require_space(checkpoints: Path, needed_bytes: int) -> None:
    """
    Raises:
        DiskError: the disk has less free space than that; no part of the save is left behind.
    """
    if _free_bytes(checkpoints) >= needed_bytes:
        return
    remove_leftovers(checkpoints)
    free = _free_bytes(checkpoints)
    if free < needed_bytes:
        raise DiskError(
            f"{checkpoints} needs {size_text(needed_bytes)} for a checkpoint, but its disk has {size_text(free)} free; "
            "free some space, keep fewer with train.keep_last (`python -m megatron_lite.checkpoint prune "
            f"{shlex.quote(str(checkpoints))} --keep-last N` removes the others now), or move the run folder to "
            "another disk and name it in train.run_dir"
        )


def publish(temporary: Path, hashes: Mapping[str, FileRecord]) -> Path:
    """Turn the folder that `begin` made into a checkpoint, by one rename. Only for the writing rank, after all ranks
    have closed their files.

    Args:
        hashes: relative name -> record of the files that the caller has hashed; the others are read here.
    Returns:
        the published folder
    Raises:
        CheckpointError: the size of a file has changed since it was hashed, or the system refuses to write.
    """
    final = temporary.with_name(temporary.name.removeprefix(".").removesuffix(".incomplete"))
    assert NAME.fullmatch(final.name)
    with explained(final):
        (temporary / MANIFEST).write_text(_manifest_text(_records(temporary, hashes)))
        for path in sorted(temporary.rglob("*"), reverse=True):  # a folder after its content
            sync(path)
        sync(temporary)
        replaced = final.with_name(f".{final.name}.replaced")
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        sync(final.parent)
        if replaced.exists():
            remove(replaced)
        _write_latest(final)
    return final


def abandon(temporary: Path) -> None:
    """Remove the temporary folder of a failed save."""
    shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def explained(final: Path) -> Iterator[None]:
    """Turn an OSError while a checkpoint is written into our error with a remedy."""
    try:
        yield
    except OSError as error:
        kind = DiskError if error.errno in DISK_ERRNOS else CheckpointError
        raise kind(
            f"{final} cannot be written ({error}); free some space or fix its permissions: the same command resumes "
            "from the last complete checkpoint"
        ) from error


def remove_leftovers(checkpoints: Path) -> None:
    """Remove leftovers of killed saves and removals; restore a folder that was moved aside for a save that failed."""
    for leftover in sorted(checkpoints.glob(".step_*")):
        moved = REPLACED.fullmatch(leftover.name)
        original = checkpoints / folder_name(int(moved[1])) if moved else None
        if original is not None and not original.exists():
            leftover.rename(original)
        else:
            remove(leftover)


def remove(folder: Path) -> None:
    """Remove a hidden folder; another process may remove it at the same time."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def step_of(folder: Path) -> int:
    """The step in a folder's name."""
    found = NAME.fullmatch(folder.name) or REPLACED.fullmatch(folder.name)
    assert found is not None
    return int(found[1])


def candidates(checkpoints: Path) -> list[Path]:
    """All folders with a checkpoint's name, newest first; a folder moved aside counts if nothing has replaced it."""
    folders = list(checkpoints.iterdir()) if checkpoints.is_dir() else []
    named = {step_of(path): path for path in folders if NAME.fullmatch(path.name) and path.is_dir()}
    aside = {step_of(path): path for path in folders if REPLACED.fullmatch(path.name)}
    return [folder for _, folder in sorted((aside | named).items(), reverse=True)]


def unfinished(checkpoints: Path) -> list[Path]:
    """Interrupted saves, newest first. (A save may also be in progress, but an active run is never resumed.)"""
    return sorted(checkpoints.glob(".step_*.incomplete"), reverse=True)


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """Relative name -> record of every file of a checkpoint except the manifest itself.

    Raises:
        CheckpointError: the manifest is missing, damaged, from another version, or names a file outside the folder.
    """
    try:
        content = read_bytes(folder / MANIFEST)
        if content is None:
            raise CheckpointError(f"it has no {MANIFEST}, so it was never finished")
        require_format(decode(content, Format, MANIFEST).format, FORMAT, MANIFEST)
        files = decode(content, _Manifest, MANIFEST).files
    except DamagedFileError as error:
        raise CheckpointError(str(error)) from error
    for name, record in files.items():
        if not _is_below(name) or record.bytes < 0:
            raise CheckpointError(
                f"{MANIFEST} is damaged: it names {name!r} of {record.bytes:,} bytes, which is not a file in its folder"
            )
    return files


def _is_below(name: str) -> bool:
    """Whether it is the plain relative name of a file inside a folder, as `publish` writes it."""
    parts = name.split("/")
    return all(part not in ("", ".", "..") for part in parts) and "\0" not in name and "\\" not in name


def is_foreign(folder: Path) -> bool:
    """Whether another version of megatron_lite wrote it: then only that version can check it."""
    try:
        read_manifest(folder), read_state(folder)
    except ForeignFormatError:
        return True
    except CheckpointError:
        return False
    return False


def quick_problem(folder: Path) -> str | None:
    """The first problem that sizes show, or None. Files that the manifest does not name are ignored."""
    return next(quick_problems(folder), None)


def quick_problems(folder: Path) -> Iterator[str]:
    """All problems of a checkpoint that sizes show."""
    try:
        records, state = read_manifest(folder), read_state(folder)
    except CheckpointError as error:
        yield str(error)
        return
    for name, record in records.items():
        found = _size_problem(folder / name, name, record.bytes)
        if found:
            yield found
    if NAME.fullmatch(folder.name) and state.step != step_of(folder):
        yield f"it holds step {state.step}, but its name says otherwise"


def content_problems(folder: Path, names: Iterable[str]) -> list[str]:
    """Problems with the content of the named files of a checkpoint: ranks may divide the files among them.

    Raises:
        CheckpointError: the manifest cannot be read.
    """
    records = read_manifest(folder)
    found = (_content_problem(folder / name, name, records[name]) for name in names)
    return [problem for problem in found if problem]


def problem(folder: Path) -> str | None:
    """The first problem of a checkpoint, after reading every byte; None if it is complete."""
    found = quick_problem(folder)
    if found is None:
        found = next(iter(content_problems(folder, read_manifest(folder))), None)
    return found


def newest_complete(
    checkpoints: Path, report: Callable[[str], None], check: Callable[[Path], str | None] = problem
) -> tuple[Path, CheckpointState] | None:
    """The newest checkpoint without a problem.

    Args:
        report: called with a line for each skipped checkpoint, and if `latest` names another one.
        check: returns the problem of a folder, or None.
    """
    chosen, skipped = None, set()
    for folder in unfinished(checkpoints):
        report(f"Skipping {folder.name}: it was never finished")
    for folder in candidates(checkpoints):
        found = check(folder)
        if found is None:
            chosen = folder
            break
        report(f"Skipping {folder.name}: {found}")
        skipped.add(folder.name)
    hint = _hint_problem(checkpoints, chosen, skipped)
    if hint:
        report(hint)
    return None if chosen is None else (chosen, read_state(chosen))


def newest_logged(run_dir: Path) -> LoggedLines | None:
    """The state of the run's metrics.jsonl as recorded in the newest readable checkpoint."""
    for folder in candidates(run_dir / "checkpoints"):
        with contextlib.suppress(CheckpointError):
            logged = read_state(folder).metrics
            return logged if logged is None or logged.is_consistent else None
    return None


def read_latest(checkpoints: Path) -> str | None:
    """The content of the file `latest`; None if it does not exist."""
    try:
        return (checkpoints / LATEST).read_text(errors="replace").strip()
    except OSError:
        return None


def _hint_problem(checkpoints: Path, chosen: Path | None, skipped: set[str]) -> str | None:
    """How the file `latest` is wrong, or None. It is only a hint; the folders decide."""
    named = read_latest(checkpoints)
    if named is None or (chosen is not None and named == chosen.name):
        return None
    if named in skipped:
        fault = "which is skipped"
    elif NAME.fullmatch(named) and (checkpoints / named).is_dir():
        fault = "which is older"
    else:
        fault = "and there is no such checkpoint"
    kept = "none is complete" if chosen is None else f"the newest complete one is {chosen.name}"
    return f"{checkpoints / LATEST} names {named[:40]!r}, {fault}; {kept}"


def _records(temporary: Path, hashes: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """The records of all files in the folder."""
    names = [str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file()]
    for name, record in hashes.items():
        found = _size_problem(temporary / name, name, record.bytes)
        if found:
            raise OSError(found)
    return {name: hashes.get(name) or _record_of(temporary / name) for name in sorted(names) if name != MANIFEST}


def _record_of(path: Path) -> FileRecord:
    return FileRecord(path.stat().st_size, file_xxh3(path))


def _manifest_text(records: Mapping[str, FileRecord]) -> str:
    return json.dumps({"format": FORMAT, "files": {name: asdict(record) for name, record in records.items()}}, indent=1)


def _write_latest(folder: Path) -> None:
    temporary = folder.with_name(f".{LATEST}")
    temporary.write_text(f"{folder.name}\n")
    sync(temporary)
    temporary.rename(folder.with_name(LATEST))
    sync(folder.parent)


def _size_problem(path: Path, name: str, expected_bytes: int) -> str | None:
    try:
        found = path.stat().st_size if path.is_file() else None
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    if found is None:
        return f"{name} is missing"
    return None if found == expected_bytes else f"{name} is {found:,} bytes; the manifest says {expected_bytes:,}"


def _content_problem(path: Path, name: str, record: FileRecord) -> str | None:
    try:
        same = file_xxh3(path) == record.xxh3
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None if same else f"{name} has other content than the manifest says"


def _free_bytes(folder: Path) -> int:
    """Free space of the file system where the folder is, or will be."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free
