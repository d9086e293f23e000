"""Checkpoint folders that are complete or invisible, whatever kills the process that writes them. Free of torch.

`checkpoints/step_00000100` appears by one rename once everything in it is on the disk, `manifest.json` with the size
and the hash of each file included. What has another name is none: `.step_00000100.incomplete` is being written,
`.removing` on its way out, `.replaced` made way for another save of the same step. Beside them the text file `latest`
names the newest folder, for people and tools; a resume looks for the newest complete folder itself.
"""

from __future__ import annotations

import contextlib
import json
import re
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
    """What the manifest says of a file."""

    bytes: int
    xxh3: str  # xxh3-128 of the content, in hexadecimal digits


@dataclass(frozen=True)
class _Manifest:
    files: dict[str, FileRecord]


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def begin(checkpoints: Path, step: int) -> Path:
    """Make the temporary folder that `publish` turns into the checkpoint of this step. For the writing rank alone.

    Leftovers of saves and removals that were killed go first.

    Raises:
        CheckpointError: the folder cannot be made.
    """
    temporary = checkpoints / f".{folder_name(step)}.incomplete"
    with explained(checkpoints / folder_name(step)):
        remove_leftovers(checkpoints)
        temporary.mkdir(parents=True)
    return temporary


def require_space(checkpoints: Path, needed_bytes: int) -> None:
    """
    Raises:
        DiskError: the disk has less than that free; nothing of the save that was to come is left behind.
    """
    if _free_bytes(checkpoints) >= needed_bytes:
        return
    remove_leftovers(checkpoints)
    free = _free_bytes(checkpoints)
    if free < needed_bytes:
        raise DiskError(
            f"{checkpoints} needs {size_text(needed_bytes)} for a checkpoint, and its disk has {size_text(free)} free; "
            "make room, keep fewer with train.keep_last (`python -m megatron_lite.checkpoint prune` drops them now), "
            "or move the run folder to another disk and name it in train.run_dir"
        )


def publish(temporary: Path, hashes: Mapping[str, FileRecord]) -> Path:
    """Turn what `begin` made into a checkpoint, by one rename. For the writing rank, once all ranks' files are closed.

    Args:
        hashes: by name relative to the folder, of the files that the caller has hashed; the others are read here.
    Returns:
        the published folder
    Raises:
        CheckpointError: a file is not as it was hashed, or the system does not let us write.
    """
    final = temporary.with_name(temporary.name.removeprefix(".").removesuffix(".incomplete"))
    assert NAME.fullmatch(final.name)
    with explained(final):
        (temporary / MANIFEST).write_text(_manifest_text(_records(temporary, hashes)))
        for path in sorted(temporary.rglob("*"), reverse=True):  # a folder after all that is in it
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
    """Free the space of a save that has failed."""
    shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def explained(final: Path) -> Iterator[None]:
    """Turn what the system says while a checkpoint is written into an error with a remedy."""
    try:
        yield
    except OSError as error:
        kind = DiskError if error.errno in DISK_ERRNOS else CheckpointError
        raise kind(
            f"{final} cannot be written ({error}); free some space or mend its permissions: the same command resumes "
            "from the last complete checkpoint"
        ) from error


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what killed saves and removals left; a folder that was moved aside for a save that failed comes back."""
    for leftover in sorted(checkpoints.glob(".step_*")):
        moved = REPLACED.fullmatch(leftover.name)
        original = checkpoints / folder_name(int(moved[1])) if moved else None
        if original is not None and not original.exists():
            leftover.rename(original)
        else:
            remove(leftover)


def remove(folder: Path) -> None:
    """Remove a folder that is out of sight; another process may be about to do the same."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def step_of(folder: Path) -> int:
    """The step that a folder's name tells."""
    found = NAME.fullmatch(folder.name) or REPLACED.fullmatch(folder.name)
    assert found is not None
    return int(found[1])


def candidates(checkpoints: Path) -> list[Path]:
    """All folders with the name of a checkpoint, newest first; one that was moved aside counts where it left a gap."""
    folders = list(checkpoints.iterdir()) if checkpoints.is_dir() else []
    named = {step_of(path): path for path in folders if NAME.fullmatch(path.name) and path.is_dir()}
    aside = {step_of(path): path for path in folders if REPLACED.fullmatch(path.name)}
    return [folder for _, folder in sorted((aside | named).items(), reverse=True)]


def unfinished(checkpoints: Path) -> list[Path]:
    """Saves that were cut short, newest first. (Or that are at work: nobody resumes a run that runs.)"""
    return sorted(checkpoints.glob(".step_*.incomplete"), reverse=True)


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """Every file of a checkpoint by its name relative to the folder, but for the manifest itself.

    Raises:
        CheckpointError: it is missing, damaged, or of another version, or names a file outside the folder.
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
                f"{MANIFEST} is damaged: it names {name!r} of {record.bytes:,} bytes, and names only files below its "
                "own folder"
            )
    return files


def _is_below(name: str) -> bool:
    """Whether it is the plain name of a file below a folder: as `publish` writes it, and never outside."""
    parts = name.split("/")
    return all(part not in ("", ".", "..") for part in parts) and "\0" not in name and "\\" not in name


def is_foreign(folder: Path) -> bool:
    """Whether it is of another version: then only that one can tell if it is complete."""
    try:
        read_manifest(folder), read_state(folder)
    except ForeignFormatError:
        return True
    except CheckpointError:
        return False
    return False


def quick_problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint as far as sizes tell, or None. Files that the manifest does not name are fine."""
    return next(quick_problems(folder), None)


def quick_problems(folder: Path) -> Iterator[str]:
    """All that is wrong with a checkpoint as far as sizes tell."""
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
        yield f"it holds step {state.step}, and not what its name says"


def content_problems(folder: Path, names: Iterable[str]) -> list[str]:
    """What is wrong with the content of some of a checkpoint's files: ranks may share them out.

    Raises:
        CheckpointError: the manifest cannot be read.
    """
    records = read_manifest(folder)
    found = (_content_problem(folder / name, name, records[name]) for name in names)
    return [problem for problem in found if problem]


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, every byte considered, or None."""
    found = quick_problem(folder)
    if found is None:
        found = next(iter(content_problems(folder, read_manifest(folder))), None)
    return found


def newest_complete(
    checkpoints: Path, report: Callable[[str], None], check: Callable[[Path], str | None] = problem
) -> tuple[Path, CheckpointState] | None:
    """The newest checkpoint without a problem.

    Args:
        report: is told of each one that is skipped, and why; and where `latest` names another one.
        check: what is wrong with a folder, or None.
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
    """What the newest checkpoint that can be read knows of the run's metrics.jsonl."""
    for folder in candidates(run_dir / "checkpoints"):
        with contextlib.suppress(CheckpointError):
            logged = read_state(folder).metrics
            return logged if logged is None or logged.is_consistent else None
    return None


def read_latest(checkpoints: Path) -> str | None:
    """What the file `latest` says, None where there is none."""
    try:
        return (checkpoints / LATEST).read_text(errors="replace").strip()
    except OSError:
        return None


def _hint_problem(checkpoints: Path, chosen: Path | None, skipped: set[str]) -> str | None:
    """In what the file `latest` is wrong: it is a hint, and the folders are the truth."""
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
    """Of every file below the folder."""
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
    """What the file system lets us write where the folder is, or will be."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free
