"""Hugging Face datasets: which files of a folder belong to a split, and the rows of a dataset.

`datasets` decides which files belong to the split, but our own readers read .jsonl, .parquet and .txt files. So a bad
row costs only one row, files may differ in their other columns, nothing is copied into a cache, and the origin of a
document is its file. The library reads all other formats.
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
"""Builder settings that our readers do not support, with the values that have no effect."""


def as_files(source: Source, data: DataConfig) -> tuple[Source, DataConfig]:
    """Replace a folder that our readers can read by the files of its split; return any other source unchanged.

    Raises:
        DataError: `datasets` cannot load the folder, or it has no such split.
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
    return found, replace(data, document_separator="\n")  # for `datasets`, each line of a text file is a row


def _require_all_counted(source: Source, counted: set[str]) -> None:
    """
    Raises:
        DataError: `datasets` assigns some data files of a folder to no split, and would silently ignore them.
    """
    folder = source.paths[0].resolve()
    if tells_its_files(folder):
        return
    left = [file for file in visible_files(folder) if is_data_file(file, folder) and str(file) not in counted]
    if left:
        pattern = left[0].with_name(f"*{left[0].suffix}")
        raise DataError(
            f"{source} is a folder in which `datasets` ignores {len(left):,} files (the first is {left[0]}), because "
            f"their names match no split; name the files by a pattern such as {pattern}, or move them out of the folder"
        )


def dataset_rows(source: Source, data: DataConfig, progress: Progress) -> Iterator[Row]:
    """The rows of a split that `datasets` reads.

    Raises:
        DataError: it cannot be loaded, has no such split, or has no text column data.text_key.
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
    """The split of a Hugging Face dataset: one saved by `save_to_disk`, or anything that `load_dataset` accepts."""
    import datasets

    quiet_hub()
    with _edge(source):
        if source.paths and _is_saved(source.paths[0]):
            loaded = datasets.load_from_disk(str(source.paths[0]))
        else:
            loaded = _generated(_folder_name(source) if source.paths else source.name, data.dataset_config)
    return _split_of(loaded, source, data) if isinstance(loaded, dict) else loaded


def _generated(name: str, config: str | None) -> Any:
    """Call `load_dataset`, and raise the cause instead of its "An error occurred while generating the dataset"."""
    import datasets

    try:
        return datasets.load_dataset(name, config)
    except datasets.exceptions.DatasetGenerationError as error:
        hidden = error.__cause__ or error
    raise hidden


def _folder_name(source: Source) -> str:
    """The resolved path: `datasets` names the dataset after its last part, and cannot handle `.` and `..`."""
    return str(source.paths[0].resolve())


def _split_of(splits: dict[str, Any], source: Source, data: DataConfig) -> Any:
    if data.dataset_split not in splits:
        there = ", ".join(splits)
        raise DataError(
            f"data.dataset_split={data.dataset_split} is not in {source}; set data.dataset_split to one of {there}"
        )
    return splits[data.dataset_split]


def _edge(source: Source) -> AbstractContextManager[None]:
    """Turn errors of `datasets` into ours; keep several lines, because later ones list configurations and columns."""
    several = "set data.dataset_config if it has several configurations"
    if source.paths:
        what, remedy = "is a folder that `datasets` cannot load", f"{several}, or name its files instead"
    else:
        what = "is not a local file, and `datasets` cannot load it"
        remedy = f"{several}, correct the name, or download it where there is a network and name its folder"
    return library_edge(DataError, f"{source} {what}", remedy, lines=MESSAGE_LINES)


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in SAVED_DATASET_FILES)


def _is_plain(config: Any) -> bool:
    """Whether the folder's README sets no builder options that only `datasets` supports."""
    return all(getattr(config, name, value) in (value, None) for name, value in PLAIN_SETTINGS.items())


def _is_array(path: Path, source: Source) -> bool:
    """Whether a JSON file is one array of rows instead of one object per line."""
    texts = (chunk.lstrip() for chunk in read_chunks(path, source))
    return next(filter(None, texts), b"").startswith(b"[")
