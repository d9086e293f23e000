"""Hugging Face datasets from local folders, through `datasets`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.corpus.digests import remembered_digests
from megatron_lite.data.corpus.readers import read_documents
from megatron_lite.data.corpus.rows import Document, RowCounts
from megatron_lite.data.corpus.source_names import resolve_source
from megatron_lite.data.corpus.sources import identity
from megatron_lite.errors import DataError
from tests.unit.remedies import obeys

datasets = pytest.importorskip("datasets")
ConfigFor = Callable[..., RunConfig]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    table = datasets.Dataset.from_dict({"text": ["one", "two"], "id": [1, 2]})
    table.save_to_disk(str(tmp_path / "saved"))
    return tmp_path / "saved"


def read(config: RunConfig) -> list[str]:
    return [text for text, _, _ in read_documents(resolve_source(config.data.source, "data.source"), config.data)]


def test_saved_dataset(saved: Path, config_for: ConfigFor) -> None:
    assert read(config_for(saved)) == ["one", "two"]


@obeys("megatron_lite/data/corpus/hugging_face.py:_split_of")
def test_saved_splits(tmp_path: Path, config_for: ConfigFor) -> None:
    parts = {name: datasets.Dataset.from_dict({"body": [f"text of {name}"]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "splits"))
    config = config_for(tmp_path / "splits", text_key="body", dataset_split="test")
    assert read(config) == ["text of test"]
    config.data.dataset_split = "dev"
    with pytest.raises(
        DataError, match=r"data\.dataset_split=dev is not in .*splits; set data.dataset_split to one of train, test"
    ):
        read(config)


def test_folder_of_files(tmp_path: Path, config_for: ConfigFor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    assert read(config_for(folder)) == ["first", "second"]


@pytest.mark.parametrize("name", [".", "..", "../folder"])
@pytest.mark.parametrize("file", ["train.jsonl", "train.csv"])
def test_a_folder_by_a_relative_name(
    name: str, file: str, tmp_path: Path, config_for: ConfigFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    folder = tmp_path / "folder"
    (folder / "inside").mkdir(parents=True)
    (folder / file).write_text('{"text": "first"}\n' if file.endswith("jsonl") else "text\nfirst\n")
    monkeypatch.chdir(folder / "inside" if name == ".." else folder)
    assert read(config_for(name)) == ["first"]


def test_missing_column(saved: Path, config_for: ConfigFor) -> None:
    with pytest.raises(DataError, match=r"has no data\.text_key=body; set data.text_key to one of text"):
        read(config_for(saved, text_key="body"))


def test_unreachable_name(config_for: ConfigFor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as error:
        read(config_for("nobody/no_such_dataset"))
    message = str(error.value)
    assert message.startswith("data.source=nobody/no_such_dataset is not a local file, and `datasets` cannot load it: ")
    assert message.endswith("correct the name, or download it where there is a network and name its folder")


def test_identity_follows_content_and_split(saved: Path, config_for: ConfigFor) -> None:
    config = config_for(saved)
    source = resolve_source(config.data.source, "data.source")

    def found() -> dict[str, Any]:
        with remembered_digests(saved.parent / "cache", lambda line: None) as file_identity:
            return identity(source, config.data, file_identity)

    before = found()
    assert found() == before
    config.data.dataset_split = "test"
    assert found() != before
    config.data.dataset_split = "train"
    (saved / "extra.arrow").write_bytes(b"x")
    assert found() != before


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def test_files_whose_columns_differ(folder: Path, config_for: ConfigFor) -> None:
    write_lines(folder / "a.jsonl", [{"text": "one", "meta": {"url": "x"}}])
    write_lines(folder / "b.jsonl", [{"text": "two", "meta": {"score": 1.0}, "lang": "en"}, "5"])
    assert read(config_for(folder, max_bad_fraction=0.5)) == ["one", "two"]
    with pytest.raises(DataError, match=rf"1 of 3 rows are bad \(1 not a JSON object: {folder}/b\.jsonl:2: "):
        read(config_for(folder))


def test_columns_that_differ_where_the_library_reads(folder: Path, config_for: ConfigFor) -> None:
    (folder / "a.csv").write_text("text,id\none,1\n")
    (folder / "b.csv").write_text("text,lang\ntwo,en\n")
    with pytest.raises(DataError) as error:
        read(config_for(folder))
    message = str(error.value)
    assert message.startswith(f"data.source={folder} is a folder that `datasets` cannot load: ")
    assert "lang" in message, "which columns"
    (folder / "b.csv").write_text("text,id\ntwo,2\n")
    assert read(config_for(folder)) == ["one", "two"]


def test_splits_and_configurations_of_a_folder(folder: Path, config_for: ConfigFor) -> None:
    for name in ("train", "test"):
        write_lines(folder / f"{name}.jsonl", [{"text": f"text of {name}"}])
    assert read(config_for(folder, dataset_split="test")) == ["text of test"]
    with pytest.raises(
        DataError, match=r"data\.dataset_split=dev is not in .*folder; set data.dataset_split to one of train, test"
    ):
        read(config_for(folder, dataset_split="dev"))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files: train.jsonl\n- config_name: b\n  data_files: test.jsonl\n---\n"
    )
    assert read(config_for(folder, dataset_config="b")) == ["text of test"]
    with pytest.raises(DataError, match=r"cannot load: ValueError: .*\['a', 'b'\].*; set data\.dataset_config"):
        read(config_for(folder))
    assert read(config_for(folder, dataset_config="a", dataset_split="train")) == ["text of train"]


@obeys("megatron_lite/data/corpus/hugging_face.py:_require_all_counted")
def test_a_file_that_belongs_to_no_split(folder: Path, config_for: ConfigFor) -> None:
    """Beside files that are named after splits `datasets` passes over all others."""
    for name in ("train", "extra", "test"):
        write_lines(folder / f"{name}.jsonl", [{"text": name}])
    with pytest.raises(DataError, match=r"ignores 1 files \(the first is .*extra\.jsonl\), because") as error:
        read(config_for(folder))
    pattern = str(error.value).partition("a pattern such as ")[2].partition(",")[0]
    assert sorted(read(config_for(pattern))) == ["extra", "test", "train"]
    (folder / "extra.jsonl").unlink()
    assert read(config_for(folder)) == ["train"]


def test_a_folder_of_text_has_a_row_a_line(folder: Path, config_for: ConfigFor) -> None:
    (folder / "a.txt").write_bytes(b"one\ntwo\n\ncaf\xe9\n")
    assert read(config_for(folder, max_bad_fraction=0.5)) == ["one", "two"]


def test_a_folder_of_arrays_is_read_by_the_library(folder: Path, config_for: ConfigFor) -> None:
    (folder / "a.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=1))
    assert read(config_for(folder)) == ["one", "two"]


def test_bad_cells_of_a_saved_dataset(tmp_path: Path, config_for: ConfigFor) -> None:
    column = pa.array([b"one", b"caf\xe9", None, b"x" * 100, b"two"], pa.binary()).view(pa.string())
    datasets.Dataset(pa.table({"text": column, "id": [1, 2, 3, 4, 5]})).save_to_disk(str(tmp_path / "saved"))
    config = config_for(tmp_path / "saved", max_bad_fraction=0.5, max_document_bytes=50)
    source = resolve_source(config.data.source, "data.source")
    counts = RowCounts("saved")
    assert list(read_documents(source, config.data, counts)) == [Document("one", 0, 0), Document("two", 0, 4)]
    assert counts.lines()[1:] == [
        f"  1 not UTF-8: {tmp_path}/saved:2: byte 0xe9 at offset 3",
        f"  1 null: {tmp_path}/saved:3",
        f"  1 too long: {tmp_path}/saved:4: 100 bytes",
    ]
    with pytest.raises(
        DataError, match=r"data\.text_key=id holds int64, but must hold text; set data.text_key to one of text"
    ):
        read(config_for(tmp_path / "saved", text_key="id"))


def test_a_saved_dataset_that_is_damaged(saved: Path, config_for: ConfigFor) -> None:
    arrow = next(saved.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:50])
    with pytest.raises(DataError, match="is a folder that `datasets` cannot load: "):
        read(config_for(saved))
    (saved / "state.json").write_text("{")
    with pytest.raises(DataError, match="is a folder that `datasets` cannot load: "):
        read(config_for(saved))
