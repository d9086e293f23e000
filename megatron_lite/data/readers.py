"""Documents of a source, one at a time, so that a corpus never has to fit into memory.

Lines are cut at "\n" alone: U+2028, U+0085 and form feed are ordinary characters of a document. Documents of nothing
but white space are left out. A lone surrogate, which no tokenizer takes, becomes U+FFFD.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from megatron_lite.config.schema import DataConfig
from megatron_lite.data.embedded import embedded_documents
from megatron_lite.data.hub import quiet_hub
from megatron_lite.data.sources import Source, SourceKind
from megatron_lite.errors import DataError

CHUNK_BYTES = 4 * 2**20
ROWS_PER_BATCH = 1024


class Document(NamedTuple):
    """A text, and where it was read."""

    text: str
    file: int
    """Place of its file in `Source.files`."""
    number: int
    """Of the row, line or document of that file, from 0, empty ones included."""


def read_documents(source: Source, data: DataConfig) -> Iterator[Document]:
    """All documents of a text source in their order.

    Raises:
        DataError: a file is empty, binary, malformed or cut off; or `data.text_key` is not there.
    """
    for text, file, number in _RAW_DOCUMENTS[source.kind](source, data):
        if text and not text.isspace():
            yield Document(without_surrogates(text), file, number)


def without_surrogates(text: str) -> str:
    """Join surrogate pairs and replace lone halves by U+FFFD; other text comes back as it is."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


Raw = Iterator[tuple[str, int, int]]
"""Text, file and number of each document, as `Document` has them."""


def _embedded(source: Source, data: DataConfig) -> Raw:
    return embedded_documents()


def _text(source: Source, data: DataConfig) -> Raw:
    for i, path in enumerate(source.paths):
        pieces = _decoded_chunks(path, source)
        texts = split_stream(pieces, data.document_separator) if data.document_separator else ["".join(pieces)]
        for number, text in enumerate(texts):
            yield text, i, number


def split_stream(pieces: Iterator[str], separator: str) -> Iterator[str]:
    """What `"".join(pieces).split(separator)` gives, in one pass and holding one document."""
    overlap = len(separator) - 1
    held: list[str] = []  # the document so far, free of separators
    carry = ""  # its last characters, which may begin a separator
    for piece in pieces:
        first, *others = (carry + piece).split(separator)
        for part in others:
            yield "".join([*held, first])
            held, first = [], part
        cut = max(len(first) - overlap, 0)
        held.append(first[:cut])
        carry = first[cut:]
    yield "".join([*held, carry])


def _decoded_chunks(path: Path, source: Source) -> Iterator[str]:
    """Text of a file by chunks. Windows line ends become "\n", so that a separator means the same everywhere."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("strict")
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    position = 0
    with open_source(path, source) as file:
        while True:
            chunk = _read(file, CHUNK_BYTES, path, source)
            if (nul := chunk.find(b"\0")) >= 0:
                raise _binary(path, source, f"byte 0x00 at offset {position + nul:,}")
            waiting = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                offset = position - waiting + error.start
                raise _binary(path, source, f"byte 0x{error.object[error.start]:02x} at offset {offset:,}") from None
            yield newlines.decode(text, final=not chunk)
            if not chunk:
                return
            position += len(chunk)


def _jsonl(source: Source, data: DataConfig) -> Raw:
    for i, path in enumerate(source.paths):
        with open_source(path, source) as file:
            for number in count():
                line = _read_line(file, path, source)
                if not line:
                    break
                if not line.isspace():
                    place = f"{path}:{number + 1}"
                    yield _field(_parse(line, place, source), data.text_key, place, source), i, number


def _parse(line: bytes, place: str, source: Source) -> dict[str, Any]:
    try:
        row = json.loads(line.rstrip(b"\r\n").decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _binary(Path(place), source, f"byte 0x{line[error.start]:02x} at offset {error.start:,}") from None
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{place} (of {source}) is not JSON: {reason}; each line must be one object") from None
    if not isinstance(row, dict):
        raise DataError(f"{place} (of {source}) holds a {type(row).__name__}; each line must be one JSON object")
    return row


def _field(row: dict[str, Any], key: str, place: str, source: Source) -> str:
    if key not in row:
        raise _no_such_key(key, sorted(row), place, source)
    return _text_or_empty(row[key], key, place, source)


def _text_or_empty(value: Any, key: str, place: str, source: Source) -> str:
    """A null is a row without text; anything else that is no string is a wrong column."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{place} (of {source}): data.text_key={key} holds a {type(value).__name__}; it must hold text")
    return value


def _parquet(source: Source, data: DataConfig) -> Raw:
    import pyarrow
    from pyarrow import parquet

    for i, path in enumerate(source.paths):
        numbers = count()
        try:
            file = parquet.ParquetFile(path)
            if data.text_key not in file.schema_arrow.names:
                raise _no_such_key(data.text_key, file.schema_arrow.names, str(path), source)
            for batch in file.iter_batches(batch_size=ROWS_PER_BATCH, columns=[data.text_key]):
                for value in batch.column(0).to_pylist():
                    yield _text_or_empty(value, data.text_key, str(path), source), i, next(numbers)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path} (of {source}) is not a readable parquet file: {_first_line(error)}") from None


def _dataset(source: Source, data: DataConfig) -> Raw:
    rows = _open_dataset(source, data)
    if data.text_key not in rows.column_names:
        raise _no_such_key(data.text_key, rows.column_names, source.name, source)
    numbers = count()
    for batch in rows.select_columns([data.text_key]).iter(batch_size=ROWS_PER_BATCH):
        for value in batch[data.text_key]:
            yield _text_or_empty(value, data.text_key, source.name, source), 0, next(numbers)


def _open_dataset(source: Source, data: DataConfig) -> Any:
    """The split of a Hugging Face dataset, saved by `save_to_disk` or anything that `load_dataset` takes."""
    quiet_hub()
    import datasets

    try:
        if source.paths and _is_saved_dataset(source.paths[0]):
            loaded = datasets.load_from_disk(str(source.paths[0]))
        else:
            loaded = datasets.load_dataset(str(source.paths[0]) if source.paths else source.name, data.dataset_config)
    except Exception as error:  # the library raises errors of many kinds, from network to parsing
        raise DataError(
            f"{source} is no local file, and `datasets` cannot load it: {type(error).__name__}: {_first_line(error)}; "
            "correct the name, or download it where there is a network and name its folder"
        ) from error
    if isinstance(loaded, dict):  # a DatasetDict
        if data.dataset_split not in loaded:
            raise DataError(f"data.dataset_split={data.dataset_split} is not in {source}; it has {', '.join(loaded)}")
        return loaded[data.dataset_split]
    return loaded


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def open_source(path: Path, source: Source) -> IO[bytes]:
    try:
        if os.path.getsize(path) == 0:
            raise DataError(f"{path} (of {source}) is empty; it must hold text")
        return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise DataError(f"{path} (of {source}) cannot be read: {error.strerror}") from None


def _read(file: IO[bytes], size: int, path: Path, source: Source) -> bytes:
    return _unpacked(lambda: file.read(size), path, source)


def _read_line(file: IO[bytes], path: Path, source: Source) -> bytes:
    return _unpacked(file.readline, path, source)


def _unpacked(read: Callable[[], bytes], path: Path, source: Source) -> bytes:
    try:
        return read()
    except EOFError:
        raise DataError(
            f"{path} (of {source}) ends in the middle of its gzip stream (truncated); copy it again"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} (of {source}) is a damaged gzip file: {error}; copy it again") from None
    except OSError as error:
        raise DataError(f"{path} (of {source}) cannot be read: {error.strerror}") from None


def _binary(path: Path, source: Source, where: str) -> DataError:
    return DataError(f"{path} (of {source}) is not UTF-8 text: {where}; convert it, or name another file")


def _no_such_key(key: str, existing: list[str], place: str, source: Source) -> DataError:
    return DataError(f"{place} (of {source}) has no data.text_key={key}; it has {', '.join(map(str, existing))}")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().split("\n")), "") or type(error).__name__


_RAW_DOCUMENTS: dict[SourceKind, Callable[[Source, DataConfig], Raw]] = {
    SourceKind.embedded: _embedded,
    SourceKind.text: _text,
    SourceKind.jsonl: _jsonl,
    SourceKind.parquet: _parquet,
    SourceKind.dataset: _dataset,
}
