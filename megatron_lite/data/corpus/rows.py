"""The rows of a source: documents, and rows without a document, each with its location and the reason.

A row is a line of a .jsonl file, a document of a .txt file, or a row of a table. A row that cannot be used is counted
by kind and skipped; too many of them stop the preparation (`data.max_bad_fraction`). Null and empty rows are counted
too, but not as bad: they are normal in corpora.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from megatron_lite.config.schema import DataConfig
from megatron_lite.data.corpus.sources import Source
from megatron_lite.errors import DataError

EXAMPLES = 3
EXAMPLE_CHARACTERS = 400


class RowKind(StrEnum):
    """Why a row contains no document."""

    not_utf8 = "not UTF-8"
    nul = "NUL character"
    not_json = "not JSON"
    not_object = "not a JSON object"
    no_text_key = "no text key"
    not_text = "not a string"
    surrogate = "lone surrogate"
    too_long = "too long"
    null = "null"
    empty = "empty"

    @property
    def is_fault(self) -> bool:
        return self not in (RowKind.null, RowKind.empty)


class Document(NamedTuple):
    """A text and its location."""

    text: str
    file: int
    """Index of its file in `Source.files`."""
    number: int
    """Row number in that file, from 0; rows without a document count, too."""


class BadRow(NamedTuple):
    """A row without a document."""

    kind: RowKind
    file: int
    number: int
    reason: str = ""
    size_bytes: int = 0
    """Size of a row that is too long."""


Row = Document | BadRow


def row_of_bytes(content: bytes, file: int, number: int) -> Row:
    """A row that consists of text only."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        return not_utf8(error, file, number)
    return row_of_text(text, file, number)


def row_of_text(text: str, file: int, number: int) -> Row:
    if not text or text.isspace():
        return BadRow(RowKind.empty, file, number)
    if (place := text.find("\0")) >= 0:
        return BadRow(RowKind.nul, file, number, f"character {place:,} is U+0000")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            reason = f"character {error.start:,} is U+{ord(text[error.start]):04X}"
            return BadRow(RowKind.surrogate, file, number, reason)
    return Document(text, file, number)


def not_utf8(error: UnicodeDecodeError, file: int, number: int) -> BadRow:
    reason = f"byte 0x{error.object[error.start]:02x} at offset {error.start:,}"
    return BadRow(RowKind.not_utf8, file, number, reason)


def too_long(size_bytes: int, file: int, number: int) -> BadRow:
    return BadRow(RowKind.too_long, file, number, f"{size_bytes:,} bytes", size_bytes)


@dataclass
class Skipped:
    """Rows of one kind without a document."""

    kind: str
    """The value of a `RowKind`."""
    count: int = 0
    examples: list[str] = field(default_factory=list)
    """The first ones, as file:row (from 1) and the reason."""


@dataclass
class RowCounts:
    """Counts of the rows of one source, stored in the manifest of the prepared data."""

    source: str
    documents: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    """In order of first occurrence."""
    longest_bytes: int = 0
    """Size of the longest row among those that are too long."""

    def add(self, row: Row, files: tuple[str, ...]) -> None:
        """Args: files: `Source.files`."""
        if isinstance(row, Document):
            self.documents += 1
            return
        entry = self.of(row.kind)
        if entry is None:
            entry = Skipped(str(row.kind))
            self.skipped.append(entry)
        entry.count += 1
        if len(entry.examples) < EXAMPLES:
            place = f"{files[row.file]}:{row.number + 1}"
            entry.examples.append(_printable(f"{place}: {row.reason}" if row.reason else place))
        self.longest_bytes = max(self.longest_bytes, row.size_bytes)

    def of(self, kind: RowKind) -> Skipped | None:
        return next((entry for entry in self.skipped if entry.kind == kind), None)

    @property
    def faults(self) -> list[Skipped]:
        """The kinds that count towards data.max_bad_fraction, the most frequent first."""
        return sorted((s for s in self.skipped if RowKind(s.kind).is_fault), key=lambda entry: -entry.count)

    @property
    def bad(self) -> int:
        return sum(entry.count for entry in self.faults)

    @property
    def rows(self) -> int:
        return self.documents + sum(entry.count for entry in self.skipped)

    def lines(self) -> list[str]:
        """The report of skipped rows; empty if none were skipped."""
        if not self.skipped:
            return []
        left_out = self.rows - self.documents
        title = f"{self.source}: {left_out:,} of {self.rows:,} rows contain no document; {self.bad:,} are bad"
        return [title, *(f"  {skipped_text(entry)}" for entry in self.skipped)]


def skipped_text(entry: Skipped) -> str:
    """A kind with its first rows: `3 not JSON: a.jsonl:7: Expecting value; ...`."""
    return f"{entry.count:,} {entry.kind}: {'; '.join(entry.examples)}" + (" ..." * (entry.count > len(entry.examples)))


def require_few_bad(counts: RowCounts, key: str, data: DataConfig) -> None:
    """Refuse a source of which too many rows are bad, or all.

    Args:
        key: the source in messages, `str(Source)`.
    Raises:
        DataError: with the counts, the first rows of each kind, and how to fix the most frequent kind.
    """
    if not counts.bad:
        return
    used = counts.documents + counts.bad
    share = counts.bad / used
    if counts.documents and share <= data.max_bad_fraction:
        return
    kinds = "; ".join(map(skipped_text, counts.faults))
    remedy = REMEDIES[RowKind(counts.faults[0].kind)](counts, data)
    if not counts.documents:
        raise DataError(f"{key}: none of its {counts.bad:,} rows can be used ({kinds}); {remedy}")
    raise DataError(
        f"{key}: {counts.bad:,} of {used:,} rows are bad ({kinds}), a share of {share:.3g} and more than "
        f"data.max_bad_fraction={data.max_bad_fraction:g}; {remedy}, or leave them out with "
        f"data.max_bad_fraction={math.ceil(share * 1000) / 1000:g}"
    )


def no_documents(counts: RowCounts, source: Source) -> DataError:
    """The error for a source without rows, or with only empty ones."""
    empty = "; ".join(map(skipped_text, counts.skipped))
    found = f" in its {counts.rows:,} rows ({empty})" if empty else ""
    return DataError(f"{source} holds no text{found}; name a source with documents in it")


def _printable(text: str) -> str:
    """Text from the corpus, escaped and shortened for a terminal."""
    plain = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return plain if len(plain) <= EXAMPLE_CHARACTERS else plain[: EXAMPLE_CHARACTERS - 3] + "..."


def _constant(text: str) -> Callable[[RowCounts, DataConfig], str]:
    return lambda counts, data: text


REMEDIES: dict[RowKind, Callable[[RowCounts, DataConfig], str]] = {
    RowKind.not_utf8: _constant("convert its text to UTF-8, a text file in Latin-1 as with `iconv -f latin1 -t utf-8`"),
    RowKind.nul: _constant("name another file, or remove the NUL characters, from a text file as with `tr -d '\\000'`"),
    RowKind.not_json: _constant("write one JSON object per line"),
    RowKind.not_object: _constant("write one JSON object per line"),
    RowKind.no_text_key: lambda counts, data: f"set data.text_key, now {data.text_key}, to the field with the text",
    RowKind.not_text: lambda counts, data: f"set data.text_key, now {data.text_key}, to a field that holds strings",
    RowKind.surrogate: _constant("write the text in UTF-8, with pairs of surrogates as one character"),
    RowKind.too_long: lambda counts, data: (
        f"make the documents shorter, or set data.max_document_bytes={counts.longest_bytes}"
    ),
}
