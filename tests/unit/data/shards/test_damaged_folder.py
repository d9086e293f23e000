"""Damage any byte of any file of prepared data: it is found and named with its remedy, or it does no harm."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_lite.config.schema import ObjectiveName, RunConfig
from megatron_lite.data.samples.loader import training_dataset, validation_dataset
from megatron_lite.data.samples.provenance import Provenance
from megatron_lite.data.samples.sample_types import PairShape, WindowShape
from megatron_lite.data.shards import prepared as prepared_module
from megatron_lite.data.shards.inspection import describe_folder, describe_pair
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.data.shards.prepared import PreparedData
from megatron_lite.errors import DataError
from tests.unit.data.conftest import document

ConfigFor = Callable[..., RunConfig]
Silent = Callable[[str], None]
FLIPS = 8  # bytes of each file
FOREIGN = b'{"format": 4, "train": [], "checksum": "0"}'


@pytest.fixture
def whole(corpus: Path, config_for: ConfigFor, silent: Silent) -> tuple[PreparedData, RunConfig]:
    """Two sources of documents of several sentences, with all kinds of files."""
    corpus.write_text("\n\n".join(f"{document(i, 8)}. This is number {i}. It ends here." for i in range(60)))
    second = corpus.with_name("second.txt")
    second.write_text("\n\n".join(f"Another {document(i, 6)}. It is {i}. No more." for i in range(100, 140)))
    config = config_for([corpus, second])
    config.objective.name = ObjectiveName.masked_lm_nsp
    return prepare(config, report=silent), config


def use(config: RunConfig, folder: Path) -> None:
    """Everything that reads a prepared folder."""
    prepared = prepare(config, report=lambda line: None)
    assert prepared.folder == folder
    tokenizer = prepared.open_tokenizer()
    assert tokenizer is not None
    assert prepared.vocabulary.size == prepared.vocab_size
    assert prepared.tokenizer_files(config)
    for shape in (WindowShape(17, 16, sentences=True), PairShape(32, 0.5, 0.1)):
        provenance = Provenance.of(prepared, config, shape)
        for index in range(40):
            assert provenance.text(index)
            assert provenance.documents(index)
        validation_dataset(prepared, config, shape).sample(0)


def damages(content: bytes, seed: str) -> Iterator[bytes | None]:
    """None = the file is gone."""
    generator = random.Random(seed)
    for place in sorted(generator.sample(range(len(content)), min(FLIPS, len(content)))):
        yield content[:place] + bytes([content[place] ^ (1 << generator.randrange(8))]) + content[place + 1 :]
    yield from (content[: len(content) // 2], bytes(len(content)), FOREIGN, b"", content + b"\0", None)


def put(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


def test_any_damage_of_any_file_is_found_and_the_remedy_works(
    whole: tuple[PreparedData, RunConfig], silent: Silent
) -> None:
    made, config = whole
    files = sorted(path for path in made.folder.rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".bin", ".idx", ".json", ".origins", ".sentences", ".npz"}
    use(config, made.folder)
    for path in files:
        content = path.read_bytes()
        for damaged in damages(content, path.name):
            put(path, damaged)
            with pytest.raises(DataError) as error:
                prepare(config, report=silent)
            message = str(error.value)
            assert str(made.folder) in message
            assert "remove " in message
            with pytest.raises(DataError):
                describe_folder(made.folder, verify=True, documents=1)
            path.write_bytes(content)
    shutil.rmtree(made.folder)  # as each of them said
    assert prepare(config, report=silent) == made


def test_a_folder_in_the_place_of_a_file(whole: tuple[PreparedData, RunConfig], silent: Silent) -> None:
    made, config = whole
    for path in sorted(path for path in made.folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.unlink()
        path.mkdir()
        with pytest.raises(DataError, match=r"remove .* to prepare it again"):
            prepare(config, report=silent)
        path.rmdir()
        path.write_bytes(content)


def test_damage_in_files_too_large_to_verify_is_found_in_use_or_does_no_harm(
    whole: tuple[PreparedData, RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, config = whole
    monkeypatch.setattr(prepared_module, "CHEAP_CHECKSUM_BYTES", -1)
    found = 0
    for path in sorted(path for path in made.folder.iterdir() if path.name.startswith("train-")):
        content = path.read_bytes()
        for damaged in damages(content, f"large {path.name}"):
            put(path, damaged)
            try:
                use(config, made.folder)
            except DataError as error:
                found += 1
                assert str(made.folder) in str(error)  # noqa: PT017
            with pytest.raises(DataError):
                describe_folder(made.folder, verify=True, documents=0)
            path.write_bytes(content)
    assert found > 60


def test_any_damage_of_a_copied_pair_is_reported(whole: tuple[PreparedData, RunConfig], tmp_path: Path) -> None:
    """With its sidecar, which goes with it: read by `inspect`, and when the pair is a source."""
    made, _ = whole
    prefix = tmp_path / "copy"
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{made.train[0].prefix}{suffix}", f"{prefix}{suffix}")
    for suffix in (".bin", ".idx", ".json"):
        path = Path(f"{prefix}{suffix}")
        content = path.read_bytes()
        for damaged in damages(content, f"pair {suffix}"):
            put(path, damaged)
            try:
                describe_pair(prefix, verify=True, documents=1)
            except DataError as error:
                assert str(prefix) in str(error)  # noqa: PT017
            else:
                assert suffix == ".json"  # some of its bytes have no meaning
            path.write_bytes(content)


def test_training_data_of_a_damaged_sidecar(
    whole: tuple[PreparedData, RunConfig], tmp_path: Path, config_for: ConfigFor, silent: Silent
) -> None:
    made, _ = whole
    prefix = tmp_path / "copy"
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{made.train[0].prefix}{suffix}", f"{prefix}{suffix}")
    shutil.copytree(made.folder / "tokenizer", tmp_path / "tokenizer")
    path = Path(f"{prefix}.json")
    content = path.read_bytes()
    config = config_for(prefix, vocab_size=510)
    for damaged in damages(content, "sidecar"):
        put(path, damaged)
        try:
            prepare(config, report=silent)
        except DataError as error:
            assert str(path) in str(error) or "tokenizer" in str(error)  # noqa: PT017
        path.write_bytes(content)
    dataset = training_dataset(prepare(config, report=silent), config, WindowShape(17, 16))
    assert len(dataset.sample(0).tokens) == 17
