"""Resolve the names in `data.source`, and report names that cannot be resolved.

This checks only names, file formats and sizes, so a dry run answers at once.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_lite.config.keys import nearest
from megatron_lite.config.schema import DataConfig
from megatron_lite.data.corpus.sources import EMBEDDED, HALF, SAVED_DATASET_FILES, Source, SourceKind, visible_files
from megatron_lite.data.corpus.streams import require_no_other_mark
from megatron_lite.errors import ConfigError, DataError, remedy_of

FORMS = (
    "use embedded, a .txt, .jsonl or .parquet file (.txt and .jsonl also as .gz, .bz2, .xz or .zst), the prefix of "
    "a Megatron .bin/.idx pair, or a Hugging Face dataset"
)
KINDS = {
    ".txt": SourceKind.text,
    ".jsonl": SourceKind.jsonl,
    ".ndjson": SourceKind.jsonl,
    ".json": SourceKind.jsonl,
    ".parquet": SourceKind.parquet,
}
PACKINGS = (".gz", ".bz2", ".xz", ".zst")
FOLDER_SUFFIXES = (*KINDS, ".csv", ".tsv", ".arrow", ".xml", ".zip", ".tar")
"""Suffixes of files that `datasets` reads in a folder."""
_FOLDER = "put it into a separate folder and name that folder, which `datasets` then reads"
_UNPACK = "unpack it and name the files that were in it"
OTHER_SUFFIXES = {
    **dict.fromkeys((".csv", ".tsv", ".arrow"), _FOLDER),
    **dict.fromkeys((*PACKINGS, ".lz4", ".br", ".lzma", ".zip", ".tar", ".tgz", ".7z", ".rar"), _UNPACK),
    **dict.fromkeys((".md", ".rst", ".text", ".log"), "give it a name that ends in .txt, if it is plain text"),
    **dict.fromkeys(
        (".html", ".htm", ".xml", ".pdf", ".docx", ".epub", ".feather", ".orc", ".avro", ".npy", ".npz", ".pkl", ".pt",
         ".safetensors", ".db", ".sqlite", ".yaml", ".yml"),
        "write its text to a .jsonl file, one object per line",
    ),
}  # fmt: skip
"""Suffix of an unsupported file -> remedy. A name with such a suffix is never taken for a hub name."""
ABOUT_DATA = (
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "dummy_data.zip",
)
"""Files of a folder that `datasets` does not read as data."""
HUB_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95})?")
ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
DOWNLOADS = {"s3": "aws s3 cp", "gs": "gcloud storage cp", "http": "curl -LO", "https": "curl -LO"}
FIRST_BYTES = 4096
LISTED_FILES = 10_000  # most files of a folder that are checked; `datasets` handles larger folders
_ACCESS = "correct the path or its permissions"


def source_names(value: Any) -> list[str]:
    """The entries of a `source` setting, which may be one string or a list of them."""
    if value is None:
        return []
    return [str(value)] if isinstance(value, str | os.PathLike) else [str(entry) for entry in value]


def require_sources(data: DataConfig) -> None:
    """Check data.source and data.validation_source together.

    Raises:
        DataError: names cannot be resolved; lists all of them.
        ConfigError: a list is empty.
    """
    problems = []
    for key in ("source", "validation_source"):
        try:
            resolve_sources(getattr(data, key), f"data.{key}")
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))


def resolve_sources(value: Any, key: str) -> list[Source]:
    """The sources behind `data.source` or `data.validation_source`.

    Raises:
        DataError: names cannot be resolved; lists all of them.
        ConfigError: the list is empty.
    """
    names = source_names(value)
    if not names and value is not None:
        raise ConfigError(f"{key}=[] names no source; {FORMS}")
    keys = [key] if isinstance(value, str) else [f"{key}[{i}]" for i in range(len(names))]
    found: list[Source] = []
    problems: list[str] = []
    for name, entry_key in zip(names, keys, strict=True):
        try:
            found.append(resolve_source(name, entry_key))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return found


def resolve_source(name: str, key: str) -> Source:
    """
    Raises:
        DataError: it names nothing that can be read; says what it is and what to do.
    """
    if name == EMBEDDED:
        return Source(key, name, SourceKind.embedded)
    entry = f"{key}={name}"
    path = _path(name, entry)
    if glob.has_magic(name) and not os.path.lexists(path):
        return _pattern(name, key, path)
    if prefix := shard_prefix(path):
        return Source(key, name, SourceKind.shards, (_pair(prefix, entry),))
    if os.path.isdir(path):
        return Source(key, name, SourceKind.dataset, (_dataset_folder(path, entry),))
    if not os.path.lexists(path) and _is_hub_name(name):
        _refuse_slip(name, entry)
        return Source(key, name, SourceKind.dataset)
    kind = _kind_of_file(path, entry)
    if path.stat().st_size == 0:
        raise DataError(f"{path} (of {entry}) is empty; name a file that holds text")
    return Source(key, name, kind, (path,))


def kind_of(name: str) -> SourceKind | None:
    """The kind of a file that our own readers read, by its name."""
    plain = _unpacked(name)
    kind = KINDS.get(os.path.splitext(plain)[1])
    return None if kind is SourceKind.parquet and plain != name.lower() else kind


def _unpacked(name: str) -> str:
    lower = name.lower()
    stem, suffix = os.path.splitext(lower)
    return stem if suffix in PACKINGS else lower


def _path(name: str, entry: str) -> Path:
    if address := ADDRESS.fullmatch(name):
        way = _way_from(name, *address.groups())
        raise DataError(f"{entry} is a URL, but sources are read from local files; {way}")
    if not name.strip() or "\0" in name:
        raise DataError(f"{entry} names no file; {FORMS}")
    try:
        path = Path(name).expanduser()
    except RuntimeError:
        raise DataError(f"{entry}: this user does not exist; write the path without ~") from None
    require_utf8(path)
    return path


def require_utf8(path: Path) -> None:
    """
    Raises:
        DataError: the name of the file has bytes that are not UTF-8, so that no record can hold it.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{str(path)!r}: the name of this file is not UTF-8; rename it") from None


def _way_from(name: str, scheme: str, rest: str) -> str:
    """The remedy for a URL: how to turn its target into a source."""
    if scheme == "file":
        return f"use {rest}"
    if scheme == "hf" and rest.startswith("datasets/") and rest.count("/") >= 2:
        return f"for this Hugging Face dataset use {'/'.join(rest.split('/')[1:3])}"
    if scheme in DOWNLOADS:
        target = " ." if DOWNLOADS[scheme].endswith("cp") else ""
        return f"download it, as with `{DOWNLOADS[scheme]} {name}{target}`, and name the file"
    return "download it and name the file"


def _pattern(name: str, key: str, path: Path) -> Source:
    """One source of all files that a glob pattern matches."""
    entry = f"{key}={name}"
    paths = sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not paths:
        raise DataError(f"{entry} matches no file (looked from {Path.cwd()}); correct the pattern")
    if prefixes := list(dict.fromkeys(str(p.with_suffix("")) for p in paths if p.suffix in (".bin", ".idx"))):
        raise DataError(f"{entry}: Megatron shards must be named one by one; use {key}=[{','.join(prefixes)}]")
    if folder := next((p for p in paths if p.is_dir()), None):
        raise DataError(f"{entry}: {folder} is a folder; use a pattern of files, such as {name.rstrip('/')}/*.*")
    kinds = {_kind_of_file(p, entry): p for p in paths}
    if len(kinds) > 1:
        found = " and ".join(str(p) for p in kinds.values())
        raise DataError(f"{entry} matches files of several formats ({found}); list one pattern per format")
    if not any(p.stat().st_size for p in paths):
        raise DataError(f"{entry} matches only empty files; name files that hold text")
    return Source(key, name, next(iter(kinds)), tuple(paths))


def shard_prefix(path: Path) -> Path | None:
    """`corpus` for the pair corpus.bin and corpus.idx, whether the prefix or one of the files was named."""
    if path.suffix in (".bin", ".idx"):
        return path.with_suffix("")
    return path if any(_halves(path)) and not path.exists() else None


def _halves(prefix: Path) -> Iterator[bool]:
    return (os.path.isfile(f"{prefix}{suffix}") for suffix in (".bin", ".idx"))


def _pair(prefix: Path, entry: str) -> Path:
    for suffix, exists in zip((".bin", ".idx"), _halves(prefix), strict=True):
        if not exists:
            raise DataError(f"{entry}: {prefix}{suffix} does not exist; {HALF}")
    return prefix


def _dataset_folder(path: Path, entry: str) -> Path:
    if any((path / name).is_file() for name in SAVED_DATASET_FILES):
        return path
    others: list[str] = []
    forms: dict[str, Path] = {}
    for file in islice(visible_files(path), LISTED_FILES):
        if is_data_file(file, path):
            forms.setdefault(_form(file), file)
            continue
        if file.suffix == ".idx" and not forms:
            raise DataError(f"{entry} is a folder of Megatron shards; use the prefix {file.with_suffix('')}")
        others.append(file.suffix or "files without a suffix")
    if len({KINDS.get(form, form) for form in forms}) > 1 and not tells_its_files(path):
        raise _several_forms(path, entry, forms)
    if forms or len(others) == LISTED_FILES:
        return path
    found = f"only {', '.join(sorted(set(others)))}" if others else "nothing"
    raise DataError(
        f"{entry} is a folder without data files: it holds {found}; name a folder of files that `datasets` reads "
        f"({', '.join(FOLDER_SUFFIXES)}) or that its save_to_disk wrote"
    )


def _form(file: Path) -> str:
    """The suffix that decides the format of a file, without a compression suffix."""
    return os.path.splitext(_unpacked(file.name))[1]


def is_data_file(file: Path, folder: Path) -> bool:
    """Whether `datasets` reads this file of a folder as data."""
    inner = file.relative_to(folder).parts
    return _form(file) in FOLDER_SUFFIXES and file.name not in ABOUT_DATA and not any(p.startswith("__") for p in inner)


def tells_its_files(folder: Path) -> bool:
    """Whether README.md lists the files for `datasets` to read: all others are then left out on purpose."""
    try:
        _, begin, _ = (folder / "README.md").read_text(encoding="utf-8", errors="replace").split("---", 2)
    except (OSError, ValueError):  # no README.md, or one without YAML front matter
        return False
    return "data_files" in begin or "data_dir" in begin


def _several_forms(folder: Path, entry: str, forms: dict[str, Path]) -> DataError:
    found = " and ".join(str(file) for file in forms.values())
    remedy = "keep the files of one format, and move the others to a folder that you add to the sources"
    if all(form in KINDS for form in forms):
        key = entry.partition("=")[0].partition("[")[0]
        endings = dict.fromkeys(
            "".join(file.suffixes[-2:] if file.suffix in PACKINGS else [file.suffix]) for file in forms.values()
        )
        patterns = ",".join(str(folder / "**" / f"*{ending}") for ending in endings)
        remedy = f"name the files of each format, as with {key}='[{patterns}]'"
    return DataError(
        f"{entry} is a folder with files of several formats ({found}), but `datasets` reads only one; {remedy}"
    )


def _is_hub_name(name: str) -> bool:
    looks_like_file = kind_of(name) is not None or os.path.splitext(name.lower())[1] in OTHER_SUFFIXES
    return not looks_like_file and HUB_NAME.fullmatch(name) is not None and ".." not in name and "--" not in name


def _refuse_slip(name: str, entry: str) -> None:
    """Catch a misspelled `embedded` before the hub is asked for it.

    Raises:
        DataError: the name is almost `embedded`.
    """
    if "/" not in name and nearest(name.lower(), [EMBEDDED]):
        raise DataError(
            f"{entry} does not exist, and the built-in source is spelled {EMBEDDED}; use {EMBEDDED}, or name a "
            "Hugging Face dataset with its owner, as OWNER/NAME"
        )


def _kind_of_file(path: Path, entry: str) -> SourceKind:
    """The kind of a file, after checking that it exists, can be read, and has a supported format."""
    require_utf8(path)
    kind = kind_of(path.name)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise _missing(path, entry, error, kind) from None
    if not stat.S_ISREG(mode):
        raise DataError(
            f"{entry}: {path} is a {_kind_of_node(mode)}, but a source is read several times; write its output to a "
            "file and name that file"
        )
    if kind is None:
        suffix = os.path.splitext(path.name.lower())[1]
        raise DataError(f"{entry}: {path} has an unknown file format; {OTHER_SUFFIXES.get(suffix, FORMS)}")
    try:
        with path.open("rb") as file:
            begin = file.read(FIRST_BYTES)
    except OSError as error:
        raise DataError(f"{entry}: {path} cannot be read: {error.strerror}; {remedy_of(error, _ACCESS)}") from None
    if kind in (SourceKind.text, SourceKind.jsonl) and path.suffix.lower() not in PACKINGS:
        require_no_other_mark(begin, path, entry)
    if path.suffix.lower() == ".json" and begin.lstrip().startswith(b"["):
        raise DataError(f"{entry}: {path} is one JSON array; write one object per line, as with `{_to_lines(path)}`")
    return kind


def _missing(path: Path, entry: str, error: OSError, kind: SourceKind | None) -> DataError:
    where = f"looked from {Path.cwd()}"
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        return DataError(f"{entry}: {path} cannot be read: {error.strerror}; {remedy_of(error, _ACCESS)}")
    if path.is_symlink():
        return DataError(f"{entry}: {path} is a link to {os.readlink(path)}, which does not exist; correct the link")
    if kind is None:
        return DataError(f"{entry} does not exist ({where}); {FORMS}")
    return DataError(f"{entry}: {path} is not a file ({where}); correct the path")


def _kind_of_node(mode: int) -> str:
    tests = ((stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISDIR, "folder"))
    return next((name for test, name in tests if test(mode)), "device")


def _to_lines(path: Path) -> str:
    code = "import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin)]"
    return f'python -c "{code}" < {path} > {path}l'
