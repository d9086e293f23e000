"""Documents of every kind of source, rows that give none, and what is said about files that hold none."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from megatron_lite.config.schema import DataConfig, RunConfig
from megatron_lite.data.corpus import streams
from megatron_lite.data.corpus.columns import MOST_ROWS, average_bytes, batch_rows
from megatron_lite.data.corpus.readers import read_documents, read_rows, row_of_line
from megatron_lite.data.corpus.rows import BadRow, Document, RowCounts, RowKind, Skipped, require_few_bad, row_of_bytes
from megatron_lite.data.corpus.source_names import resolve_source, resolve_sources
from megatron_lite.data.corpus.streams import Oversized, split_records, with_newlines
from megatron_lite.errors import DataError
from tests.unit.remedies import obeys

ConfigFor = Callable[..., RunConfig]

BAD_LINES: dict[RowKind, list[bytes]] = {
    RowKind.not_utf8: [b'{"text": "caf\xe9"}', b'{"text": "\xed\xa0\x80"}', b'{"\xff": 1, "text": "x"}'],
    RowKind.nul: [b'{"text": "a\0b"}', b'{"text": "a\\u0000b"}', b"\0" * 20],
    RowKind.not_json: [
        b'{"text": "cut off',
        b'{"text": "x"',
        b"nonsense",
        b"[" * 100_000,
        b'{"text": ' + b'{"a":' * 20_000,
        b'{"text": "x", "id": ' + b"9" * 6000 + b"}",
        b'{"text": "raw \x01 control"}',
    ],
    RowKind.not_object: [b"5", b'["x"]', b'"text"', b"true", b"null", b"1e999"],
    RowKind.no_text_key: [b'{"body": "x"}', b"{}", b'{"\\ud800": 1}'],
    RowKind.not_text: [b'{"text": 5}', b'{"text": ["x"]}', b'{"text": {"text": "x"}}', b'{"text": false}'],
    RowKind.surrogate: [b'{"text": "a\\ud800b"}', b'{"text": "\\udc00\\ud83d"}'],
    RowKind.too_long: [b'{"text": "' + b"x" * 200_000 + b'"}'],
    RowKind.null: [b'{"text": null}'],
    RowKind.empty: [b"", b"  \t ", b"\xef\xbb\xbf", b'{"text": ""}', b'{"text": " \\n\\u2003"}'],
}
LIMIT = 150_000


def documents_of(config: RunConfig) -> list[str]:
    sources = resolve_sources(config.data.source, "data.source")
    return [text for source in sources for text, _, _ in read_documents(source, config.data)]


def failure_of(config: RunConfig) -> str:
    with pytest.raises(DataError) as error:
        documents_of(config)
    return str(error.value)


def counts_of(config: RunConfig) -> RowCounts:
    source = resolve_source(config.data.source, "data.source")
    counts = RowCounts(source.name)
    list(read_documents(source, config.data, counts))
    return counts


def write_jsonl(path: Path, rows: list[object]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write(path: Path, content: bytes) -> Path:
    packings = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    packings[".zst"] = lambda raw: pa.Codec("zstd").compress(raw, asbytes=True)
    path.write_bytes(packings.get(path.suffix, bytes)(content))
    return path


# ------------------------------------------------------------------------------------------------- good rows
def test_text_is_split_at_the_separator(tmp_path: Path, config_for: ConfigFor) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\nline\n\ntwo\n\n\n\n \n\nthree\n")
    assert documents_of(config_for(path)) == ["one\nline", "two", "three\n"]
    assert documents_of(config_for(path, document_separator=None)) == [path.read_text()]
    assert documents_of(config_for(path, document_separator="line")) == ["one\n", "\n\ntwo\n\n\n\n \n\nthree\n"]


def test_only_the_separator_splits(tmp_path: Path, config_for: ConfigFor) -> None:
    text = "a\u2028b\u0085c\x0cd\x0be\x1cf\u2029g"
    (tmp_path / "a.txt").write_text(text + "\n\nnext", encoding="utf-8")
    assert documents_of(config_for(tmp_path / "a.txt")) == [text, "next"]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert documents_of(config_for(tmp_path / "a.jsonl")) == [text]


@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n"])
def test_windows_line_ends_and_byte_order_mark(tmp_path: Path, config_for: ConfigFor, separator: str) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\nmore\r\n\r\ntwo")
    assert documents_of(config_for(tmp_path / "a.txt", document_separator=separator)) == ["one\nmore", "two"]


@given(
    st.lists(st.text("ab\n<|>é", max_size=8), max_size=8),
    st.sampled_from(["\n\n", "a", "aba", "<|>", "é", ""]),
    st.integers(1, 30),
)
def test_records_are_those_of_split_whatever_the_chunks(parts: list[str], separator: str, limit: int) -> None:
    content, mark = separator.join(parts).encode(), separator.encode()
    whole = content.split(mark) if mark else [content]
    if not whole[-1]:  # behind the last separator
        whole.pop()
    expected = [record if len(record) <= limit else Oversized(len(record)) for record in whole]
    for size in range(1, len(content) + 1):
        chunks = (content[i : i + size] for i in range(0, len(content), size))
        assert list(split_records(chunks, mark, limit)) == expected


@given(st.text("a\r\n", max_size=12), st.integers(1, 5))
def test_newlines_are_translated_whatever_the_chunks(text: str, size: int) -> None:
    content = text.encode()
    chunks = (content[i : i + size] for i in range(0, len(content), size))
    assert b"".join(with_newlines(chunks)).decode() == text.replace("\r\n", "\n").replace("\r", "\n")


def test_characters_across_chunks(tmp_path: Path, config_for: ConfigFor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CHUNK_BYTES", 3)
    text = "größe 漢字 🙂\r\n\r\nzweites\r\nEnde"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert documents_of(config_for(tmp_path / "a.txt")) == ["größe 漢字 🙂", "zweites\nEnde"]


@pytest.mark.parametrize("packing", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_every_packing(tmp_path: Path, config_for: ConfigFor, packing: str) -> None:
    rows = [{"text": "one\n\nstill one"}, {"text": None}, {"text": "  "}, {"text": "two", "other": 1}]
    path = write_jsonl(tmp_path / f"a.jsonl{packing}", rows)
    if packing:  # several streams one after another, as parallel packers write them
        path.write_bytes(path.read_bytes() * 2)
    assert documents_of(config_for(path)) == ["one\n\nstill one", "two"] * (2 if packing else 1)
    assert documents_of(config_for(write(tmp_path / f"a.txt{packing}", b"one\n\ntwo"))) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.ndjson", "a.json", "a.JSON.gz"])
def test_other_names_of_json_lines(tmp_path: Path, config_for: ConfigFor, name: str) -> None:
    path = tmp_path / name
    content = b'{"text": "one"}\n{"text": "two"}\n'
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert documents_of(config_for(path)) == ["one", "two"]


def test_other_text_key(tmp_path: Path, config_for: ConfigFor) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "one"}])
    assert documents_of(config_for(path, text_key="body")) == ["one"]


def test_pairs_of_surrogates_are_characters(tmp_path: Path, config_for: ConfigFor) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d\\ude42"}\n')
    assert documents_of(config_for(tmp_path / "a.jsonl")) == ["a 🙂"]


# -------------------------------------------------------------------------------------------------- bad rows
def test_every_kind_of_bad_row_is_counted_and_skipped(tmp_path: Path, config_for: ConfigFor) -> None:
    lines, expected = [b'{"text": "first"}'], {}
    for kind, found in BAD_LINES.items():
        expected[kind.value] = [len(lines) + 1 + i for i in range(len(found))]
        lines += found
    lines.append(b'{"text": "last"}')
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    config = config_for(path, max_bad_fraction=0.97, max_document_bytes=LIMIT)
    assert documents_of(config) == ["first", "last"]
    counts = counts_of(config)
    assert {entry.kind: entry.count for entry in counts.skipped} == {
        str(kind): len(found) for kind, found in BAD_LINES.items()
    }
    for entry in counts.skipped:
        places = [f"{path}:{number}" for number in expected[entry.kind][:3]]
        assert [example.split(": ")[0] for example in entry.examples] == places
        assert all(example.isprintable() for example in entry.examples)
    assert counts.documents == 2
    assert counts.rows == len(lines)
    source = resolve_source(str(path), "data.source")
    rows = list(read_rows(source, config.data))
    assert [row.number for row in rows] == list(range(len(lines)))
    assert rows[-1] == Document("last", 0, len(lines) - 1)


@given(st.binary(max_size=60))
def test_any_line_is_a_document_or_a_bad_row(line: bytes) -> None:
    for content in (line, b'{"text": "' + line + b'"}', b'{"text": ' + line):
        row = row_of_line(content.replace(b"\n", b""), "text", 0, 7)
        assert isinstance(row, BadRow) or (row.text.strip() and row.text.encode("utf-8") and "\0" not in row.text)
        assert row.number == 7


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_any_json_value_is_a_document_or_a_bad_row(value: object) -> None:
    row = row_of_line(json.dumps({"text": value}).encode(), "text", 0, 0)
    usable = isinstance(value, str) and value.strip() and "\0" not in value
    assert isinstance(row, Document) == bool(usable)
    if usable:
        assert row == Document(value, 0, 0)
    assert isinstance(row_of_line(json.dumps(value).encode(), "text", 0, 0), BadRow)


def test_bad_documents_of_a_text_file(tmp_path: Path, config_for: ConfigFor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte that is not UTF-8 spoils its own document, wherever the chunks end."""
    documents = [b"one", b"caf\xe9 here", b"two", b"NUL \0 here", b"", b"cut \xe2\x82", b"x" * 50, "größe".encode()]
    content = b"\n\n".join(documents)
    for size in (1, 2, 7, 1000):
        monkeypatch.setattr(streams, "CHUNK_BYTES", size)
        for name in ("a.txt", "a.txt.gz"):
            path = write(tmp_path / name, content)
            config = config_for(path, max_bad_fraction=0.6, max_document_bytes=40)
            assert documents_of(config) == ["one", "two", "größe"]
            assert counts_of(config).lines() == [
                f"{path}: 5 of 8 rows contain no document; 4 are bad",
                f"  2 not UTF-8: {path}:2: byte 0xe9 at offset 3; {path}:6: byte 0xe2 at offset 4",
                f"  1 NUL character: {path}:4: character 4 is U+0000",
                f"  1 empty: {path}:5",
                f"  1 too long: {path}:7: 50 bytes",
            ]


def test_a_share_of_bad_rows_is_allowed(tmp_path: Path, config_for: ConfigFor) -> None:
    rows: list[object] = [{"text": f"number {i}"} for i in range(97)] + [5, {"text": 5}, {"text": 7}, {"text": None}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert len(documents_of(config_for(path, max_bad_fraction=0.03))) == 97
    message = failure_of(config_for(path))
    assert message == (
        f"data.source={path}: 3 of 100 rows are bad (2 not a string: {path}:99: text is a number; {path}:100: text is "
        f"a number; 1 not a JSON object: {path}:98: it is a number), a share of 0.03 and more than "
        "data.max_bad_fraction=0.01; set data.text_key, now text, to a field that holds strings, or leave them out "
        "with data.max_bad_fraction=0.03"
    )
    remedy = float(message.rsplit("=", 1)[1])
    assert len(documents_of(config_for(path, max_bad_fraction=remedy))) == 97


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_the_fraction_that_the_message_gives_is_enough(good: int, bad: int) -> None:
    counts = RowCounts("a.jsonl", good, [Skipped("not JSON", bad, ["a.jsonl:1"])])
    data = DataConfig(max_bad_fraction=0.0)
    with pytest.raises(DataError) as error:
        require_few_bad(counts, "data.source=a.jsonl", data)
    data.max_bad_fraction = float(str(error.value).rsplit("=", 1)[1])
    assert data.max_bad_fraction <= 1
    require_few_bad(counts, "data.source=a.jsonl", data)


def test_remedies_of_sources_that_are_all_bad(tmp_path: Path, config_for: ConfigFor) -> None:
    """Each is obeyed, and then the source is read; no fraction allows a source without a document."""
    latin = tmp_path / "latin.txt"
    latin.write_bytes("größe\n\ncafé".encode("latin-1"))
    message = failure_of(config_for(latin, max_bad_fraction=1.0))
    assert message.startswith(f"data.source={latin}: none of its 2 rows can be used (2 not UTF-8: {latin}:1: byte 0xf6")
    assert message.endswith("; convert its text to UTF-8, a text file in Latin-1 as with `iconv -f latin1 -t utf-8`")
    latin.write_text(latin.read_bytes().decode("latin-1"), encoding="utf-8")
    assert documents_of(config_for(latin)) == ["größe", "café"]

    keys = write_jsonl(tmp_path / "keys.jsonl", [{"title": 5, "body": "one"}])
    message = failure_of(config_for(keys))
    assert f"(1 no text key: {keys}:1: it has body, title); set data.text_key, now text, to the field" in message
    assert "set data.text_key, now title, to a field that holds strings" in failure_of(
        config_for(keys, text_key="title")
    )
    assert documents_of(config_for(keys, text_key="body")) == ["one"]

    long = tmp_path / "long.txt"
    long.write_text("long " * 20 + "\n\n" + "longer " * 30)
    message = failure_of(config_for(long, max_document_bytes=50))
    assert message.endswith("; make the documents shorter, or set data.max_document_bytes=210")
    assert len(documents_of(config_for(long, max_document_bytes=210))) == 2

    nul = tmp_path / "utf16.txt"
    nul.write_bytes("plain".encode("utf-16-le"))
    message = failure_of(config_for(nul))
    assert message.endswith("or remove the NUL characters, from a text file as with `tr -d '\\000'`")
    nul.write_bytes(nul.read_bytes().translate(None, b"\0"))
    assert documents_of(config_for(nul)) == ["plain"]

    half = tmp_path / "half.jsonl"
    half.write_text('{"text": "\\ud83d"}\n')
    assert failure_of(config_for(half)).endswith("; write the text in UTF-8, with pairs of surrogates as one character")
    half.write_text(json.dumps({"text": "🙂"}, ensure_ascii=False), encoding="utf-8")
    assert documents_of(config_for(half)) == ["🙂"]

    pretty = tmp_path / "pretty.jsonl"
    pretty.write_text(json.dumps({"text": "one"}, indent=1))
    assert failure_of(config_for(pretty)).endswith("; write one JSON object per line")
    pretty.write_text(json.dumps(json.loads(pretty.read_text())))
    assert documents_of(config_for(pretty)) == ["one"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz"])
def test_a_long_row_is_never_held(tmp_path: Path, config_for: ConfigFor, name: str) -> None:
    """What a packed file of a few kilobytes can unpack to is read, counted and dropped as it comes."""
    before, behind = (b'{"text": "', b'"}\n{"text": "next"}\n') if "jsonl" in name else (b"", b"\n\nnext")
    path = write(tmp_path / name, before + b"x" * 40_000_000 + behind)
    assert path.stat().st_size < 100_000
    config = config_for(path, max_bad_fraction=0.5, max_document_bytes=1_000_000)
    read: list[int] = []
    counts = RowCounts("a")
    source = resolve_source(str(path), "data.source")
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    documents = list(read_documents(source, config.data, counts, read.append))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [document.text for document in documents] == ["next"]
    assert 40_000_000 <= counts.longest_bytes <= 40_000_012
    assert peak < 8_000_000, "a few chunks and the longest row that is allowed"
    assert pa.total_allocated_bytes() - arrow < 8_000_000
    assert len(read) > 35, "progress is told all the way"
    assert sum(read) == len(before) + 40_000_000 + len(behind)


# ---------------------------------------------------------------------------------------------- broken files
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.txt.bz2", "a.jsonl.xz", "a.jsonl.zst"])
@obeys("megatron_lite/data/corpus/streams.py:reading")
def test_packed_files_that_are_cut_off_or_damaged(tmp_path: Path, config_for: ConfigFor, name: str) -> None:
    content = "".join(json.dumps({"text": f"number {i * i}"}) + "\n" for i in range(500)).encode()
    path = write(tmp_path / name, content)
    packed = path.read_bytes()
    zeroed = packed[: len(packed) // 2] + bytes(40) + packed[len(packed) // 2 + 40 :]
    for damaged in (packed[: len(packed) // 2], packed[:-1], b"this is not a packed file", zeroed):
        path.write_bytes(damaged)
        message = failure_of(config_for(path))
        assert message.startswith(f"{path} (of data.source={path}) cannot be read beyond ")
        assert message.endswith("; copy it again, or name another file")
    path.write_bytes(packed)
    assert documents_of(config_for(path))


def test_a_file_that_vanishes(tmp_path: Path, config_for: ConfigFor) -> None:
    for name in ("a.txt", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        path = tmp_path / name
        path.write_bytes(b"x")
        source = resolve_source(str(path), "data.source")
        path.unlink()
        with pytest.raises(DataError, match=rf"{name} \(of data\.source=.*\) cannot be read: FileNotFoundError"):
            list(read_documents(source, config_for(path).data))


# ---------------------------------------------------------------------------------------------------- parquet
def test_parquet(tmp_path: Path, config_for: ConfigFor) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["one", None, "two", ""], "id": [1, 2, 3, 4]}), path)
    assert documents_of(config_for(path)) == ["one", "two"]
    assert counts_of(config_for(path)).lines()[1:] == [f"  1 null: {path}:2", f"  1 empty: {path}:4"]
    assert failure_of(config_for(path, text_key="body")) == (
        f"{path} (of data.source={path}) has no data.text_key=body; set data.text_key to one of text"
    )
    path.write_bytes(path.read_bytes()[:-10])
    message = failure_of(config_for(path))
    assert message.startswith(f"{path} (of data.source={path}) cannot be read: ArrowInvalid: ")
    assert message.endswith("; copy it again, or name another file")


def test_cells_of_a_fixed_size(tmp_path: Path, config_for: ConfigFor) -> None:
    column = pa.array([b"abc", "gö".encode(), b"\xff\xff\xff", None], pa.binary(3))
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert documents_of(config_for(tmp_path / "a.parquet", max_bad_fraction=0.6)) == ["abc", "gö"]


def test_cells_that_are_bad(tmp_path: Path, config_for: ConfigFor) -> None:
    cells = [b"one", b"caf\xe9", b"NUL \0", b"x" * 5000, None, b" ", "größe".encode()]
    small, large = pa.array(cells, pa.binary()), pa.array(cells, pa.large_binary())
    for column in (small, small.view(pa.string()), large, large.view(pa.large_string())):
        path = tmp_path / "a.parquet"
        parquet.write_table(pa.table({"text": column}), path)
        config = config_for(path, max_bad_fraction=0.6, max_document_bytes=1000)
        assert documents_of(config) == ["one", "größe"]
        assert counts_of(config).lines()[1:] == [
            f"  1 not UTF-8: {path}:2: byte 0xe9 at offset 3",
            f"  1 NUL character: {path}:3: character 4 is U+0000",
            f"  1 too long: {path}:4: 5,000 bytes",
            f"  1 null: {path}:5",
            f"  1 empty: {path}:6",
        ]


@obeys("megatron_lite/data/corpus/columns.py:require_text")
def test_columns_of_other_types(tmp_path: Path, config_for: ConfigFor) -> None:
    words = pa.array(["one", None, "two"])
    columns = {
        "text": words,
        "dictionary": words.dictionary_encode(),
        "nothing": pa.nulls(3),
        "number": pa.array([1, 2, 3]),
        "nested": pa.array([{"text": "x"}] * 3),
        "list": pa.array([["x"]] * 3),
    }
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table(columns), path)
    for name in ("text", "dictionary"):
        assert documents_of(config_for(path, text_key=name)) == ["one", "two"]
    assert documents_of(config_for(path, text_key="nothing")) == []
    for name, kind in (("number", "int64"), ("nested", "struct<text: string>"), ("list", "list<")):
        message = failure_of(config_for(path, text_key=name))
        assert message.startswith(f"{path} (of data.source={path}): data.text_key={name} holds {kind}")
        assert message.endswith(", but must hold text; set data.text_key to one of text, dictionary, nothing")


def test_batches_of_large_cells_are_small(tmp_path: Path) -> None:
    for cell, rows in (("x" * 40, MOST_ROWS), ("x" * 2**20, 4), ("x" * 2**23, 1)):
        path = tmp_path / "a.parquet"
        parquet.write_table(pa.table({"id": [0, 1, 2], "text": [cell] * 3}), path, use_dictionary=False)
        assert batch_rows(average_bytes(parquet.ParquetFile(path).metadata, "text")) == pytest.approx(rows, abs=1)


def test_a_dot_in_the_name_of_a_column_of_parquet(tmp_path: Path, config_for: ConfigFor) -> None:
    """For Arrow it is the way to a field inside a column as well."""
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"doc": [{"text": "inside"}], "doc.text": ["one"]}), path)
    assert documents_of(config_for(path, text_key="doc.text")) == ["one"]


def test_encrypted_parquet(tmp_path: Path, config_for: ConfigFor) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["one"]}), path)
    content = path.read_bytes()
    path.write_bytes(b"PARE" + content[4:-4] + b"PARE")  # how a file with an encrypted footer begins and ends
    assert f"{path} (of data.source={path}) cannot be read: " in failure_of(config_for(path))


@pytest.mark.parametrize("place", [0.2, 0.5])
def test_parquet_that_is_damaged_inside(tmp_path: Path, config_for: ConfigFor, place: float) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": [f"number {i}" for i in range(3000)]}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    start = int(len(content) * place)
    content[start : start + 200] = bytes(200)
    path.write_bytes(bytes(content))
    message = failure_of(config_for(path))
    assert f"{path} (of data.source={path}) cannot be read from row " in message


# ------------------------------------------------------------------------------------------------------ files
def test_several_files_by_pattern_are_one_source(tmp_path: Path, config_for: ConfigFor) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    (tmp_path / "d.txt").touch()  # an empty part is no fault
    config = config_for(tmp_path / "*.txt")
    assert documents_of(config) == ["text of a", "text of b", "text of c"]
    assert len(resolve_sources(config.data.source, "data.source")) == 1


def test_row_numbers_begin_anew_in_each_file(tmp_path: Path, config_for: ConfigFor) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n5')
    (tmp_path / "b.jsonl").write_text('[]\n{"text": "two"}\n')
    config = config_for(tmp_path / "*.jsonl", max_bad_fraction=0.5)
    source = resolve_source(config.data.source, "data.source")
    assert list(read_documents(source, config.data)) == [Document("one", 0, 0), Document("two", 1, 1)]
    assert counts_of(config).lines()[1:] == [
        f"  2 not a JSON object: {tmp_path}/a.jsonl:2: it is a number; {tmp_path}/b.jsonl:1: it is a list"
    ]


def test_bytes_of_a_row_are_text_or_bad() -> None:
    assert row_of_bytes("größe".encode(), 1, 2) == Document("größe", 1, 2)
    assert row_of_bytes(b"\xff", 1, 2) == BadRow(RowKind.not_utf8, 1, 2, "byte 0xff at offset 0")


def test_the_example_of_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.jsonl").write_text('{"text": "one"}\n5\n')
    page = (Path(__file__).resolve().parents[4] / "docs" / "data.md").read_text()
    exec(page.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out == f"one\n{tmp_path}/corpus.jsonl:2 not a JSON object: it is a number\n"
