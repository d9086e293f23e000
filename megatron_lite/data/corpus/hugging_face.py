"""Hugging Face datasets: what `datasets` says about a folder or a name, and its rows.

A folder of .jsonl, .parquet or .txt files is read by our own readers: `datasets` decides which files make the split.
So a bad row is one row, files may differ in their other columns, nothing is copied into a cache, and a document's
origin is its file. The library reads the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_lite.config.schema import DataConfig
from megatron_lite.data.corpus.columns import batch_rows, column_rows, require_text
from megatron_lite.data.corpus.rows import Row
from megatron_lite.data.corpus.source_names import is_data_file, kind_of, require_utf8, tells_its_files
from megatron_lite.data.corpus.sources import SAVED_DATASET_FILES, Source, SourceKind, visible_files
from megatron_lite.data.corpus.streams import Progress, read_chunks
from megatron_lite.data.hub import quiet_hub
from megatron_lite.errors import DataError, library_edge

BUILDERS = {"json": SourceKind.jsonl, "parquet": SourceKind.parquet, "text": SourceKind.text}
MESSAGE_LINES = 8
PLAIN_SETTINGS: dict[str, Any] = {"field": None, "encoding": "utf-8", "filters": None, "sample_by": "line"}
"""Settings of a builder that our readers know nothing of, with the values that make no difference."""


def as_files(source: Source, data: DataConfig) -> tuple[Source, DataConfig]:
    """A folder of files that we can read as the source of its split's files; any other source as it is.

    Raises:
        DataError: `datasets` makes nothing of the folder, or it has no such split.
    """
    if source.kind is not SourceKind.dataset or not source.paths or _is_saved(source.paths[0]):
        return source, data
    import datasets

    quiet_hub()
    with _edge(source):
        builder = datasets.load_dataset_builder(_folder_name(source), data.dataset_config)
    files = builder.config.data_files
    kind = BUILDERS.get(builder.name)
    if not isinstance(files, dict):
        return source, data
    _require_all_counted(source, {str(name) for found in files.values() for name in found})
    if kind is None or not _is_plain(builder.config):
        return source, data
    of_split = _split_of({str(name): found for name, found in files.items()}, source, data)
    paths = tuple(Path(name) for name in of_split)
    for path in paths:
        require_utf8(path)
    if any(kind_of(path.name) is not kind or not path.is_file() for path in paths):
        return source, data
    found = replace(source, kind=kind, paths=paths)
    if kind is SourceKind.jsonl and any(_is_array(path, found) for path in paths):
        return source, data
    return found, replace(data, document_separator="\n")  # `datasets` takes a line of text as a row


def _require_all_counted(source: Source, counted: set[str]) -> None:
    """
    Raises:
        DataError: `datasets` counts some data files of a folder to no split at all, and so would pass over them.
    """
    folder = source.paths[0].resolve()
    if tells_its_files(folder):
        return
    left = [file for file in visible_files(folder) if is_data_file(file, folder) and str(file) not in counted]
    if left:
        pattern = left[0].with_name(f"*{left[0].suffix}")
        raise DataError(
            f"{source} is a folder of which `datasets` counts {len(left):,} files to no split, {left[0]} first, for "
            f"their names; name the files by a pattern such as {pattern}, or move these away"
        )


def dataset_rows(source: Source, data: DataConfig, progress: Progress) -> Iterator[Row]:
    """The rows of a split that `datasets` reads.

    Raises:
        DataError: it cannot be loaded, or has no such split, or no column data.text_key that holds text.
    """
    split = _open(source, data)
    with _edge(source):
        schema, size = split.features.arrow_schema, split.data.nbytes / max(split.data.num_rows, 1)
    require_text(schema, data.text_key, source.name, source)
    with _edge(source):
        column = split.select_columns([data.text_key]).with_format("arrow")
        tables = column.iter(batch_size=batch_rows(size))
    batches = (table.column(0).chunks for table in tables)
    yield from column_rows(filter(None, batches), source.name, 0, source, data, progress)


def _open(source: Source, data: DataConfig) -> Any:
    """The split of a Hugging Face dataset, saved by `save_to_disk` or anything that `load_dataset` takes."""
    import datasets

    quiet_hub()
    with _edge(source):
        if source.paths and _is_saved(source.paths[0]):
            loaded = datasets.load_from_disk(str(source.paths[0]))
        else:
            loaded = _generated(_folder_name(source) if source.paths else source.name, data.dataset_config)
    return _split_of(loaded, source, data) if isinstance(loaded, dict) else loaded


def _generated(name: str, config: str | None) -> Any:
    """`load_dataset`, which hides the cause of a failure behind "An error occurred while generating the dataset"."""
    import datasets

    try:
        return datasets.load_dataset(name, config)
    except datasets.exceptions.DatasetGenerationError as error:
        hidden = error.__cause__ or error
    raise hidden


def _folder_name(source: Source) -> str:
    """With a last part that is a name: `datasets` calls the dataset by it, and makes nothing of `.` and `..`."""
    return str(source.paths[0].resolve())


def _split_of(splits: dict[str, Any], source: Source, data: DataConfig) -> Any:
    if data.dataset_split not in splits:
        there = ", ".join(splits)
        raise DataError(
            f"data.dataset_split={data.dataset_split} is not in {source}; set data.dataset_split to one of {there}"
        )
    return splits[data.dataset_split]


def _edge(source: Source) -> AbstractContextManager[None]:
    """Of `datasets`, which names configurations and columns in later lines of its messages."""
    several = "set data.dataset_config if it has several configurations"
    if source.paths:
        what, remedy = "is a folder that `datasets` cannot load", f"{several}, or name its files instead"
    else:
        what = "is no local file, and `datasets` cannot load it"
        remedy = f"{several}, correct the name, or download it where there is a network and name its folder"
    return library_edge(DataError, f"{source} {what}", remedy, lines=MESSAGE_LINES)


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in SAVED_DATASET_FILES)


def _is_plain(config: Any) -> bool:
    """Whether the folder's README asks for no way of reading that is the library's own."""
    return all(getattr(config, name, value) in (value, None) for name, value in PLAIN_SETTINGS.items())


def _is_array(path: Path, source: Source) -> bool:
    """Whether a file of JSON is one array of rows instead of an object a line."""
    texts = (chunk.lstrip() for chunk in read_chunks(path, source))
    return next(filter(None, texts), b"").startswith(b"[")
