"""Hugging Face datasets from local folders, through `datasets`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.readers import read_documents
from megatron_lite.data.source_names import resolve_source
from megatron_lite.data.sources import identity
from megatron_lite.errors import DataError

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


def test_saved_splits(tmp_path: Path, config_for: ConfigFor) -> None:
    parts = {name: datasets.Dataset.from_dict({"body": [f"text of {name}"]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "splits"))
    config = config_for(tmp_path / "splits", text_key="body", dataset_split="test")
    assert read(config) == ["text of test"]
    config.data.dataset_split = "dev"
    with pytest.raises(DataError, match=r"data\.dataset_split=dev is not in .*splits; it has train, test"):
        read(config)


def test_folder_of_files(tmp_path: Path, config_for: ConfigFor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    assert read(config_for(folder)) == ["first", "second"]


def test_missing_column(saved: Path, config_for: ConfigFor) -> None:
    with pytest.raises(DataError, match=r"has no data\.text_key=body; it has text, id"):
        read(config_for(saved, text_key="body"))


def test_unreachable_name(config_for: ConfigFor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as error:
        read(config_for("nobody/no_such_dataset"))
    message = str(error.value)
    assert message.startswith("data.source=nobody/no_such_dataset is no local file, and `datasets` cannot load it: ")
    assert message.endswith("correct the name, or download it where there is a network and name its folder")


def test_identity_follows_content_and_split(saved: Path, config_for: ConfigFor) -> None:
    config = config_for(saved)
    source = resolve_source(config.data.source, "data.source")
    before = identity(source, config.data)
    assert identity(source, config.data) == before
    config.data.dataset_split = "test"
    assert identity(source, config.data) != before
    config.data.dataset_split = "train"
    (saved / "extra.arrow").write_bytes(b"x")
    assert identity(source, config.data) != before
