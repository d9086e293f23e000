"""Bad rows through a whole preparation: shown, kept in the manifest, never in the way of the documents around them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_lite.config.schema import RunConfig
from megatron_lite.data import progress_lines
from megatron_lite.data.samples.loader import training_dataset
from megatron_lite.data.samples.provenance import Provenance
from megatron_lite.data.shards import tokenise
from megatron_lite.data.shards.origins import read_origins
from megatron_lite.data.shards.prepare import prepare, prepared_folder
from megatron_lite.data.shards.prepared import PreparedData, load_prepared
from megatron_lite.errors import DataError
from tests.unit.data.conftest import document, windows
from tests.unit.remedies import obeys

ConfigFor = Callable[..., RunConfig]
DOCUMENTS = 60
BAD = (b'{"text": "caf\xe9"}', b"5", b'{"text": "cut', b'{"body": "x"}', b'{"text": null}', b"")


def lines_with_faults(first: int) -> list[bytes]:
    """Documents from `first` on, with a bad line behind every tenth of them."""
    lines = []
    for i in range(DOCUMENTS):
        lines.append(json.dumps({"text": document(first + i)}).encode())
        if i % 10 == 9:
            lines.append(BAD[i // 10])
    return lines


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines_with_faults(0)))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines_with_faults(100))))
    texts = [document(200 + i).encode() if i != 7 else b"caf\xe9" for i in range(DOCUMENTS)]
    (tmp_path / "c.txt").write_bytes(b"\n\n".join(texts))
    parquet.write_table(pa.table({"text": pa.array(texts, pa.binary()).view(pa.string())}), tmp_path / "d.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(2):  # files whose other columns differ
        rows = [{"text": document(300 + 100 * i + j), f"only_in_{i}": {"score": j}} for j in range(DOCUMENTS)]
        lines = [json.dumps(row) for row in rows]
        lines.insert(11, "7")
        (folder / f"part-{i}.jsonl").write_text("\n".join(lines))
    return [tmp_path / "*.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.txt", tmp_path / "d.parquet", folder]


def test_bad_rows_are_shown_and_kept_and_documents_stay_whole(
    sources: list[Path], config_for: ConfigFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(sources, max_bad_fraction=0.1, num_workers=1)
    lines: list[str] = []
    monkeypatch.setattr(progress_lines, "REPORT_SECONDS", 0.0)
    prepared = prepare(config, report=lines.append)
    assert any(line.startswith(f"tokenising {sources[2]}: ") and " read" in line for line in lines)
    manifest = json.loads((prepared.folder / "prepared.json").read_text())
    assert manifest["rows"] == [asdict(counts) for counts in prepared.rows]
    assert [counts.documents for counts in prepared.rows] == [60, 60, 59, 59, 120]
    assert [counts.bad for counts in prepared.rows] == [4, 4, 1, 1, 2]
    shown = "\n".join(lines)
    for place in ("a.jsonl:11: byte 0xe9", "b.jsonl.gz:22", "c.txt:8", "d.parquet:8", "folder/part-0.jsonl:12"):
        assert place in shown
    assert lines[-1].startswith("prepared "), "the counts stand at the end"
    check_origins(prepared, config, tmp_path)

    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 500)
    config.data.num_workers, config.data.cache_dir = 3, str(tmp_path / "other")
    again = prepare(config, report=lines.append)
    assert again.rows == prepared.rows
    assert again.fingerprint == prepared.fingerprint


def check_origins(prepared: PreparedData, config: RunConfig, folder: Path) -> None:
    """Every document is traced to the row that holds it, by the original files."""
    tokenizer = prepared.open_tokenizer()
    assert tokenizer is not None
    provenance = Provenance(training_dataset(prepared, config, windows(config)), prepared)
    checked = 0
    for index in range(300):
        for part in provenance.documents(index):
            rows = rows_of(Path(part.file))
            ids, _ = tokenizer.encode_documents([rows[part.document]])
            sample = provenance.dataset.sample(index).tokens[part.place : part.place + part.tokens]
            assert sample.tolist() == ids[part.first_token : part.first_token + part.tokens].tolist()
            checked += 1
    assert checked > 300
    origins = [read_origins(shard.origins, shard.origins_bytes) for shard in prepared.train if shard.origins]
    assert len(origins) == 5
    assert set(prepared.train[4].files) == {str(folder / "folder" / f"part-{i}.jsonl") for i in range(2)}


def rows_of(path: Path) -> list[str]:
    """What stands in each row, read without our readers."""
    if path.suffix == ".parquet":
        cells = parquet.read_table(path)["text"].cast(pa.binary()).to_pylist()
        return [cell.decode("utf-8", "replace") for cell in cells]
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if path.suffix == ".txt":
        return content.decode("utf-8", "replace").split("\n\n")
    return [text_of(line) for line in content.split(b"\n")]


def text_of(line: bytes) -> str:
    try:
        return str(json.loads(line)["text"])
    except (ValueError, KeyError, TypeError):
        return ""


@obeys("megatron_lite/data/corpus/rows.py:require_few_bad")
def test_too_many_are_fatal_before_a_tokenizer_is_trained(sources: list[Path], config_for: ConfigFor) -> None:
    config = config_for(sources[0])
    with pytest.raises(DataError, match=r"4 of 64 rows are bad .*data\.max_bad_fraction=0\.063$") as error:
        prepare(config, report=lambda line: None)
    assert not list(Path(config.data.cache_dir).glob("*/prepared.json"))
    config.data.max_bad_fraction = float(str(error.value).rsplit("=", 1)[1])
    prepared = prepare(config, report=lambda line: None)
    assert prepared.train_documents + prepared.validation_documents == 60
    config.data.max_bad_fraction = 0.01
    assert prepared_folder(config) == prepared.folder, "the documents are the same"
    name = f"{sources[0].parent}/./{sources[0].name}"
    config.data.source = [name]
    assert prepared_folder(config) == prepared.folder
    with pytest.raises(DataError, match=rf"^data\.source\[0\]={re.escape(name)}: 4 of 64 rows are bad"):
        prepare(config, report=lambda line: None)
    assert load_prepared(prepared.folder, config).rows == prepared.rows, "a run that goes on is not stopped"


def test_the_longest_document_names_the_folder(sources: list[Path], config_for: ConfigFor) -> None:
    config = config_for(sources[2])
    before = prepared_folder(config)
    config.data.max_document_bytes = 100
    assert prepared_folder(config) != before


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_sources_without_a_document(tmp_path: Path, config_for: ConfigFor, name: str) -> None:
    path = tmp_path / name
    for rows, message in (
        ([None, "", " \n"], r"holds no text in its 3 rows \((1 null|2 empty|3 empty): "),
        (["caf\0", "caf\0"], "none of its 2 rows can be used"),
    ):
        if name.endswith("parquet"):
            parquet.write_table(pa.table({"text": pa.array(rows, pa.string())}), path)
        elif name.endswith("txt"):
            path.write_text("|".join(text or "" for text in rows))
        else:
            content = "\n".join(json.dumps({"text": text}) for text in rows).encode()
            path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        config = config_for(path, document_separator="|", max_bad_fraction=1.0)
        lines: list[str] = []
        with pytest.raises(DataError, match=message):
            prepare(config, report=lines.append)
