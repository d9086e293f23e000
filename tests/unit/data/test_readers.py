"""Documents of every kind of source, and what is said about files that hold none."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_lite.config.schema import RunConfig
from megatron_lite.data import readers
from megatron_lite.data.readers import read_documents, split_stream, without_surrogates
from megatron_lite.data.sources import SourceKind, resolve_source, resolve_sources
from megatron_lite.errors import ConfigError, DataError

ConfigFor = Callable[..., RunConfig]


def documents_of(config: RunConfig) -> list[str]:
    sources = resolve_sources(config.data.source, "data.source")
    return [text for source in sources for text, _, _ in read_documents(source, config.data)]


def failure_of(config: RunConfig) -> str:
    with pytest.raises(DataError) as error:
        documents_of(config)
    return str(error.value)


def write_jsonl(path: Path, rows: list[object]) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


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


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path, config_for: ConfigFor) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\nmore\r\n\r\ntwo")
    assert documents_of(config_for(tmp_path / "a.txt")) == ["one\nmore", "two"]


@pytest.mark.parametrize("separator", ["\n\n", "x", "aba", "<|>"])
def test_split_stream_equals_split_whatever_the_pieces(separator: str) -> None:
    text = "ab\n\n\nabababa<|>x\n\n<|><|\n>abab\n\n"
    for size in range(1, len(text) + 1):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert list(split_stream(iter(pieces), separator)) == text.split(separator)


def test_characters_across_chunks(tmp_path: Path, config_for: ConfigFor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 3)
    text = "größe 漢字 🙂\r\n\r\nzweites\r\nEnde"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert documents_of(config_for(tmp_path / "a.txt")) == ["größe 漢字 🙂", "zweites\nEnde"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_binary_file_is_named_with_its_offset(
    tmp_path: Path, config_for: ConfigFor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 7)
    path = tmp_path / name
    for content, place in (
        (b"fine text\x00 then", "byte 0x00 at offset 9"),
        ("fine ü ".encode() + b"\xff rest", "byte 0xff at offset 8"),
        (b"123456\xe2\x82", "byte 0xe2 at offset 6"),  # a character that is cut off
        (b"12345\xe2\x28more", "byte 0xe2 at offset 5"),
    ):
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        message = f"{path} (of data.source={path}) is not UTF-8 text: {place}; convert it, or name another file"
        assert failure_of(config_for(path)) == message


def test_jsonl_plain_and_packed(tmp_path: Path, config_for: ConfigFor) -> None:
    rows = [{"text": "one\n\nstill one"}, {"text": None}, {"text": "  "}, {"text": "two", "other": 1}]
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert documents_of(config_for(write_jsonl(tmp_path / name, rows))) == ["one\n\nstill one", "two"]


def test_blank_lines_of_jsonl_are_counted_and_skipped(tmp_path: Path, config_for: ConfigFor) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n{"text": \n')
    message = failure_of(config_for(path))
    assert message.startswith(f"{path}:4 (of data.source={path}) is not JSON: Expecting value (column ")
    assert message.endswith("each line must be one object")


def test_other_text_key(tmp_path: Path, config_for: ConfigFor) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "one"}])
    assert documents_of(config_for(path, text_key="body")) == ["one"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x", "title": "y"}', "has no data.text_key=text; it has body, title"),
        ('["x"]', "holds a list; each line must be one JSON object"),
        ('{"text": 5}', "data.text_key=text holds a int; it must hold text"),
        ('{"text": "cut', "is not JSON: Unterminated string"),
        ("[" * 100_000, "is not JSON: "),
        ('{"text": ' + "9" * 5000 + "}", "is not JSON: Exceeds the limit"),
    ],
)
def test_malformed_jsonl_names_file_and_line(tmp_path: Path, config_for: ConfigFor, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    found = failure_of(config_for(path))
    assert found.startswith(f"{path}:2 (of data.source={path})")
    assert message in found


def test_binary_jsonl(tmp_path: Path, config_for: ConfigFor) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    assert f"{path}:2 (of data.source={path}) is not UTF-8 text: byte 0xff at offset 10" in failure_of(config_for(path))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
def test_truncated_gzip(tmp_path: Path, config_for: ConfigFor, name: str) -> None:
    path = tmp_path / name
    content = gzip.compress("".join(json.dumps({"text": f"number {i * i}"}) + "\n" for i in range(500)).encode())
    path.write_bytes(content[: len(content) // 2])
    assert f"{path} (of data.source={path}) ends in the middle of its gzip stream (truncated)" in failure_of(
        config_for(path)
    )


def test_damaged_gzip(tmp_path: Path, config_for: ConfigFor) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"this is no gzip file")
    assert "is a damaged gzip file" in failure_of(config_for(path))
    content = bytearray(gzip.compress(b'{"text": "x"}\n' * 1000))
    content[20:40] = bytes(20)
    path.write_bytes(bytes(content))
    assert "is a damaged gzip file" in failure_of(config_for(path))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.txt.gz"])
def test_empty_file(tmp_path: Path, config_for: ConfigFor, name: str) -> None:
    path = tmp_path / name
    path.touch()
    assert failure_of(config_for(path)) == f"{path} (of data.source={path}) is empty; it must hold text"


def test_lone_surrogates_are_replaced_and_pairs_joined(tmp_path: Path, config_for: ConfigFor) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude42"}\n')
    assert documents_of(config_for(path)) == ["a\ufffdb 🙂"]
    assert without_surrogates("\udc00\ud83d\ude42") == "\ufffd🙂"


def test_parquet(tmp_path: Path, config_for: ConfigFor) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["one", None, "two"], "id": [1, 2, 3]}), path)
    assert documents_of(config_for(path)) == ["one", "two"]
    assert f"{path} (of data.source={path}) has no data.text_key=body; it has text, id" in failure_of(
        config_for(path, text_key="body")
    )
    assert "data.text_key=id holds a int; it must hold text" in failure_of(config_for(path, text_key="id"))
    path.write_bytes(path.read_bytes()[:-10])
    assert f"{path} (of data.source={path}) is not a readable parquet file" in failure_of(config_for(path))


def test_several_files_by_pattern_are_one_source(tmp_path: Path, config_for: ConfigFor) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    config = config_for(tmp_path / "*.txt")
    assert documents_of(config) == ["text of a", "text of b", "text of c"]
    assert len(resolve_sources(config.data.source, "data.source")) == 1
    with pytest.raises(DataError, match=r"data\.source=.*/\*\.jsonl matches no file"):
        resolve_sources(str(tmp_path / "*.jsonl"), "data.source")


def test_kinds_are_told_by_names(tmp_path: Path) -> None:
    (tmp_path / "a.TXT").write_text("x")
    (tmp_path / "ready.bin").touch()
    (tmp_path / "folder").mkdir()
    kinds = {
        "embedded": SourceKind.embedded,
        str(tmp_path / "a.TXT"): SourceKind.text,
        str(tmp_path / "ready"): SourceKind.shards,
        str(tmp_path / "ready.idx"): SourceKind.shards,
        str(tmp_path / "folder"): SourceKind.dataset,
        "owner/name": SourceKind.dataset,
    }
    assert {name: resolve_source(name, "data.source").kind for name in kinds} == kinds


@pytest.mark.parametrize("name", ["missing.txt", "missing/deeper/a.jsonl", "/missing/a.parquet"])
def test_missing_file(name: str) -> None:
    with pytest.raises(DataError, match=rf"data\.source\[1\]={name}: .* is not a file \(looked from .*\); correct"):
        resolve_sources(["embedded", name], "data.source")


def test_missing_place_without_suffix() -> None:
    with pytest.raises(
        DataError, match=r"data\.source=/missing/corpus does not exist \(looked from .*\); use embedded"
    ):
        resolve_sources("/missing/corpus", "data.source")


def test_file_of_no_known_form(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"a\.csv is a file of no known form; use embedded, a \.txt"):
        resolve_sources(str(tmp_path / "a.csv"), "data.source")


def test_empty_list() -> None:
    with pytest.raises(ConfigError, match=r"data\.source=\[\] names no source"):
        resolve_sources([], "data.source")
