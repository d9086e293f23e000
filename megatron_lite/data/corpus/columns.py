"""Rows of a text column, read from parquet files and Hugging Face datasets in Arrow batches.

Cells are read as bytes and decoded here: a cell that is not UTF-8 costs one row, and a cell that is too long is never
copied. Arrow itself always reads a whole parquet page, or a whole cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lite.config.schema import DataConfig
from megatron_lite.data.corpus.rows import BadRow, Row, RowKind, row_of_bytes, too_long
from megatron_lite.data.corpus.sources import Source
from megatron_lite.data.corpus.streams import Progress, reading
from megatron_lite.errors import DataError

if TYPE_CHECKING:
    import pyarrow

BATCH_BYTES = 2**22
MOST_ROWS = 1024


def parquet_rows(path: Path, file: int, source: Source, data: DataConfig, progress: Progress) -> Iterator[Row]:
    """The rows of one parquet file.

    Raises:
        DataError: the file cannot be read, or has no text column data.text_key.
    """
    with reading(path, source):
        from pyarrow import parquet

        opened = parquet.ParquetFile(path)
    with opened:
        require_text(opened.schema_arrow, data.text_key, str(path), source)
        rows = batch_rows(average_bytes(opened.metadata, data.text_key))
        with reading(path, source):
            batches = opened.iter_batches(batch_size=rows, columns=[data.text_key])
        # `columns` also selects fields inside a column: `a.b` may return the column `a` as well
        columns = ([batch.column(batch.schema.names.index(data.text_key))] for batch in batches)
        yield from column_rows(columns, str(path), file, source, data, progress)


def column_rows(
    batches: Iterator[list[Any]], name: str, file: int, source: Source, data: DataConfig, progress: Progress
) -> Iterator[Row]:
    """The rows of a column.

    Args:
        batches: lists of Arrow arrays, read by a library.
        name: the file or dataset that they come from, for messages.
    """
    number = 0
    while True:
        with reading(name, source, f"from row {number + 1:,} on"):
            cells = [_cells(array, data.max_document_bytes) for array in next(batches, [])]
        if not cells:
            return
        for values, sizes in cells:
            progress(sum(size or 0 for size in sizes))
            for value, size in zip(values, sizes, strict=True):
                yield _row(value, size, file, number)
                number += 1


def require_text(schema: pyarrow.Schema, key: str, name: str, source: Source) -> None:
    """
    Raises:
        DataError: there is no such column, or it holds something other than text; names the text columns.
    """
    texts = [field.name for field in schema if _is_text(field.type)]
    remedy = f"set data.text_key to one of {', '.join(texts)}" if texts else "name a table with a text column"
    if key not in schema.names:
        raise DataError(f"{name} (of {source}) has no data.text_key={key}; {remedy}")
    kind = schema.field(schema.names.index(key)).type
    if not _is_text(kind):
        raise DataError(f"{name} (of {source}): data.text_key={key} holds {_named(kind)}, but must hold text; {remedy}")


def batch_rows(average_bytes: float) -> int:
    """Number of rows to read at a time, so that a batch takes a few MiB."""
    return int(min(max(BATCH_BYTES / max(average_bytes, 1), 1), MOST_ROWS))


def _row(value: bytes | None, size: int | None, file: int, number: int) -> Row:
    if size is None:
        return BadRow(RowKind.null, file, number)
    return too_long(size, file, number) if value is None else row_of_bytes(value, file, number)


def _cells(array: pyarrow.Array, limit_bytes: int) -> tuple[list[bytes | None], list[int | None]]:
    """The cells of an array (None for those that are too long) and their sizes in bytes (None for a null)."""
    import pyarrow
    from pyarrow import compute

    storage = array.storage if isinstance(array, pyarrow.ExtensionArray) else array
    cells = storage.cast(pyarrow.large_binary())
    sizes = compute.binary_length(cells)
    longest = compute.max(sizes).as_py() or 0
    if longest > limit_bytes:
        cells = compute.if_else(compute.greater(sizes, limit_bytes), None, cells)
    return cells.to_pylist(), sizes.to_pylist()


def _is_text(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    tests: tuple[Callable[[Any], bool], ...] = (
        types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary,
        types.is_binary_view, types.is_fixed_size_binary, types.is_null,
    )  # fmt: skip
    plain = getattr(kind, "storage_type", kind)
    plain = plain.value_type if types.is_dictionary(plain) else plain
    return any(test(plain) for test in tests)


def _named(kind: pyarrow.DataType) -> str:
    text = str(kind)
    return text if len(text) <= 60 else f"{text[:57]}..."


def average_bytes(metadata: Any, key: str) -> float:
    """Average uncompressed bytes of a cell, in the row group where this average is largest."""
    places = [j for j in range(metadata.num_columns) if metadata.schema.column(j).path == key]
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    averages = (group.column(j).total_uncompressed_size / max(group.num_rows, 1) for group in groups for j in places)
    return max(averages, default=1.0)
