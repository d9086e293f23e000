"""Rows and documents of a source, streamed, so that a corpus need not fit into memory.

Only "\\n" ends a line: U+2028, U+0085 and form feed are ordinary characters of a document. Documents of only white
space are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_lite.config.schema import DataConfig
from megatron_lite.data.corpus.columns import parquet_rows
from megatron_lite.data.corpus.embedded import embedded_documents
from megatron_lite.data.corpus.hugging_face import as_files, dataset_rows
from megatron_lite.data.corpus.rows import (
    BadRow,
    Document,
    Row,
    RowCounts,
    RowKind,
    not_utf8,
    require_few_bad,
    row_of_bytes,
    row_of_text,
    too_long,
)
from megatron_lite.data.corpus.sources import Source, SourceKind
from megatron_lite.data.corpus.streams import BYTE_ORDER_MARK, Oversized, Progress, ignore_progress, read_records

SHOWN_FIELDS = 20


def read_documents(
    source: Source, data: DataConfig, counts: RowCounts | None = None, progress: Progress = ignore_progress
) -> Iterator[Document]:
    """All documents of a text source in order.

    Args:
        counts: counts every row.
    Raises:
        DataError: a file cannot be read; or, after the last document, too many rows are bad (data.max_bad_fraction).
    """
    source, data = as_files(source, data)
    counts = RowCounts(source.name) if counts is None else counts
    files = source.files
    for row in read_rows(source, data, progress):
        counts.add(row, files)
        if isinstance(row, Document):
            yield row
    require_few_bad(counts, str(source), data)


def read_rows(source: Source, data: DataConfig, progress: Progress = ignore_progress) -> Iterator[Row]:
    """All rows of a text source in order: documents, and bad rows with the reason.

    Args:
        source: as returned by `as_files`.
    Raises:
        DataError: a file cannot be read, or a table has no column data.text_key.
    """
    if source.kind is SourceKind.embedded:
        for text, file, number in embedded_documents():
            progress(len(text))
            if text.strip():  # some modules are empty: not worth a report
                yield row_of_text(text, file, number)
    elif source.kind is SourceKind.dataset:
        yield from dataset_rows(source, data, progress)
    else:
        for file, path in enumerate(source.paths):
            yield from _FILE_READERS[source.kind](path, file, source, data, progress)


def _text(path: Path, file: int, source: Source, data: DataConfig, progress: Progress) -> Iterator[Row]:
    records = read_records(
        path,
        source,
        separator=data.document_separator,
        limit_bytes=data.max_document_bytes,
        universal_newlines=True,
        progress=progress,
    )
    for number, record in enumerate(records):
        if isinstance(record, Oversized):
            yield too_long(record.size_bytes, file, number)
        else:
            yield row_of_bytes(record, file, number)


def _jsonl(path: Path, file: int, source: Source, data: DataConfig, progress: Progress) -> Iterator[Row]:
    lines = read_records(path, source, separator="\n", limit_bytes=data.max_document_bytes, progress=progress)
    for number, line in enumerate(lines):
        if isinstance(line, Oversized):
            yield too_long(line.size_bytes, file, number)
        else:
            yield row_of_line(line, data.text_key, file, number)


def row_of_line(line: bytes, key: str, file: int, number: int) -> Row:
    """A line of .jsonl: the text of one field of its object."""
    line = line.removeprefix(BYTE_ORDER_MARK).strip(b" \t\r")  # concatenated files have marks inside
    if not line:
        return BadRow(RowKind.empty, file, number)
    if (place := line.find(b"\0")) >= 0:
        return BadRow(RowKind.nul, file, number, f"byte 0x00 at offset {place:,}")
    try:
        found = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return not_utf8(error, file, number)
    except json.JSONDecodeError as error:
        return BadRow(RowKind.not_json, file, number, f"{error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:  # an integer with thousands of digits; deep nesting
        return BadRow(RowKind.not_json, file, number, str(error))
    if not isinstance(found, dict):
        return BadRow(RowKind.not_object, file, number, f"it is a {_JSON_NAMES[type(found)]}")
    if key not in found:
        return BadRow(RowKind.no_text_key, file, number, f"it has {_listed(sorted(found))}")
    text = found[key]
    if text is None:
        return BadRow(RowKind.null, file, number)
    if not isinstance(text, str):
        return BadRow(RowKind.not_text, file, number, f"{key} is a {_JSON_NAMES[type(text)]}")
    return row_of_text(text, file, number)


def _listed(fields: list[str]) -> str:
    more = f" and {len(fields) - SHOWN_FIELDS} more" if len(fields) > SHOWN_FIELDS else ""
    return ", ".join(fields[:SHOWN_FIELDS]) + more if fields else "no field"


_JSON_NAMES = {
    dict: "object",
    list: "list",
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    type(None): "null",
}
_FILE_READERS: dict[SourceKind, Callable[[Path, int, Source, DataConfig, Progress], Iterator[Row]]] = {
    SourceKind.text: _text,
    SourceKind.jsonl: _jsonl,
    SourceKind.parquet: parquet_rows,
}
