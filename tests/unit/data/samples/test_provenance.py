"""From samples back to documents: by what the samples hold, and by what the original files hold."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.config.schema import ObjectiveName, RunConfig
from megatron_lite.data.samples.provenance import DocumentPart, Provenance, merged, tokens_of
from megatron_lite.data.shards.indexed import IndexedReader
from megatron_lite.data.shards.origins import read_origins
from megatron_lite.data.shards.prepare import prepare, prepared_folder
from megatron_lite.data.shards.prepared import PreparedData, Shard
from megatron_lite.errors import DataError
from megatron_lite.objectives.base import Objective
from megatron_lite.objectives.build import build_objective
from tests.unit.data.conftest import document

ConfigFor = Callable[..., RunConfig]
MARKER = re.compile(r"<<[a-z]+\d+>>")


def marked(name: str, number: int, words: int) -> str:
    """A document that says who it is all the way, so that any run of 60 characters of it does."""
    return " ".join(f"<<{name}{number}>> the {word}." for word in document(number, words).split(" "))


def write_sources(folder: Path) -> dict[str, list[str]]:
    """Four files with some empty documents: the documents of each as they are numbered, by its path."""
    sizes = np.random.default_rng(2).integers(1, 40, 200).tolist()
    texts = {
        "a.txt": [marked("a", i, sizes[i]) if i % 5 else " " for i in range(60)],
        "b1.txt": [marked("b", i, sizes[i + 60]) for i in range(30)],
        "b2.txt": [marked("c", i, sizes[i + 90]) if i else "" for i in range(30)],
        "d.jsonl": [marked("d", i, sizes[i + 120]) if i % 7 else "" for i in range(60)],
    }
    for name, documents in texts.items():
        if name.endswith(".txt"):
            (folder / name).write_text("\n\n".join(documents))
        else:
            rows = [json.dumps({"text": text}) if i % 14 else "" for i, text in enumerate(documents)]
            (folder / name).write_text("\n".join(rows))
    return {str(folder / name): documents for name, documents in texts.items()}


@pytest.fixture
def blend(
    tmp_path: Path, config_for: ConfigFor, silent: Callable[[str], None]
) -> tuple[RunConfig, dict[str, list[str]]]:
    """Two sources of text, one of them of two files, another of JSON lines, and a ready pair: prepared, with what each
    file holds. The documents of the ready pair are those of its own preparation."""
    originals = write_sources(tmp_path)
    (tmp_path / "e.txt").write_text("\n\n".join(marked("e", i, 20) for i in range(60)))
    first = prepare(
        config_for([tmp_path / "a.txt", tmp_path / "b*.txt", tmp_path / "d.jsonl", tmp_path / "e.txt"]), report=silent
    )
    made = first.train[3].prefix
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{made}{suffix}", tmp_path / f"pair{suffix}")
    reader, tokenizer = IndexedReader(tmp_path / "pair"), first.open_tokenizer()
    assert tokenizer is not None
    pair = [tokenizer.decode(reader.document(i)).removesuffix("<|endoftext|>") for i in range(reader.num_documents)]
    config = config_for(
        [tmp_path / "a.txt", tmp_path / "b*.txt", tmp_path / "d.jsonl", tmp_path / "pair"],
        tokenizer=str(first.tokenizer_dir),
        seq_length=64,
        weights=[0.3, 0.3, 0.2, 0.2],
    )
    return config, {**originals, str(tmp_path / "pair"): pair}


def opened(config: RunConfig, name: str = "causal_lm") -> tuple[PreparedData, Objective]:
    config.objective.name = ObjectiveName(name)
    prepared = prepare(config, report=lambda line: None)
    return prepared, build_objective(config.objective, config.data, prepared.vocabulary)


def check_part(part: DocumentPart, tokens: np.ndarray, provenance: Provenance, original: str) -> None:
    """That these tokens are the part of the original document that it says they are."""
    tokenizer = provenance.tokenizer
    assert tokenizer is not None
    ids, _ = tokenizer.encode_documents([original])
    assert tokens.tolist() == ids[part.first_token : part.first_token + part.tokens].tolist()


@pytest.mark.parametrize("name", list(ObjectiveName))
def test_samples_of_two_epochs_are_the_documents_that_provenance_names(
    blend: tuple[RunConfig, dict[str, list[str]]], name: str
) -> None:
    config, originals = blend
    prepared, objective = opened(config, name)
    provenance = Provenance.of(prepared, config, objective.shape)
    last = provenance.dataset.samples_in(2)
    seen: set[tuple[str, int]] = set()
    for index in range(last):
        parts = provenance.documents(index)
        tokens = np.concatenate(tokens_of(provenance.dataset.sample(index)))
        assert sum(part.tokens for part in parts) == len(tokens)
        assert [part.place for part in parts] == np.cumsum([0, *(part.tokens for part in parts)])[:-1].tolist()
        for part in parts:
            original = originals[part.file][part.document]
            check_part(part, tokens[part.place : part.place + part.tokens], provenance, original)
        text = provenance.text(index)
        named = {MARKER.findall(originals[part.file][part.document])[0] for part in parts if part.tokens > 40}
        assert named <= set(MARKER.findall(text)) <= {MARKER.findall(originals[p.file][p.document])[0] for p in parts}
        seen |= {(part.file, part.document) for part in parts}
    assert {file for file, _ in seen} == set(originals)
    # Documents are found in exactly the samples that hold their marker.
    file, number = sorted(seen)[len(seen) // 2]
    marker = MARKER.findall(originals[file][number])[0]
    holding = {i for i in range(last) if marker in MARKER.findall(provenance.text(i))}
    naming = {i for i in range(last) if any((p.file, p.document) == (file, number) for p in provenance.documents(i))}
    assert holding
    assert holding <= naming


def test_held_out_documents_are_in_no_training_sample(blend: tuple[RunConfig, dict[str, list[str]]]) -> None:
    config, originals = blend
    prepared, objective = opened(config)
    provenance = Provenance.of(prepared, config, objective.shape)
    used = {(p.file, p.document) for i in range(provenance.dataset.samples_in(2)) for p in provenance.documents(i)}
    of_shards = {shard: _documents_of(shard) for shard in (*prepared.train[:3], *prepared.validation[:3])}
    for held_out in prepared.validation[:3]:
        assert of_shards[held_out]
        assert not of_shards[held_out] & used
    every = set().union(*of_shards.values())
    texts = {(file, i) for file, texts in originals.items() for i, text in enumerate(texts) if text.strip()}
    assert every == {
        (file, i) for file, i in texts if not file.endswith("pair") and not (i % 14 == 0 and "d.json" in file)
    }


def _documents_of(shard: Shard) -> set[tuple[str, int]]:
    assert shard.origins
    return {(shard.files[file], number) for file, number in read_origins(shard.origins, shard.origins_bytes).tolist()}


def test_parts_of_many_samples_become_documents() -> None:
    def part(document: int, first: int, tokens: int) -> DocumentPart:
        return DocumentPart("s", "f", document, first, tokens, 0)

    found = merged({7: [part(1, 10, 5), part(2, 0, 3)], 5: [part(1, 2, 4), part(1, 30, 1)]})
    assert found == [
        {"source": "s", "file": "f", "document": 1, "first_token": 2, "tokens": 29, "samples": [7, 5]},
        {"source": "s", "file": "f", "document": 2, "first_token": 0, "tokens": 3, "samples": [7]},
    ]
    assert json.loads(json.dumps(found)) == found


def test_shards_without_a_tokenizer_give_ids(blend: tuple[RunConfig, dict[str, list[str]]], tmp_path: Path) -> None:
    config, _ = blend
    (tmp_path / "pair.json").unlink()
    config.data.source, config.data.weights, config.data.tokenizer = str(tmp_path / "pair"), None, "train"
    config.model.vocab_size = 510
    prepared, objective = opened(config)
    provenance = Provenance.of(prepared, config, objective.shape)
    assert provenance.text(3) == " ".join(map(str, provenance.dataset.sample(3).tokens))
    assert {part.file for part in provenance.documents(3)} == {str(tmp_path / "pair")}


def test_origins_of_parquet_gzip_and_datasets(
    tmp_path: Path, config_for: ConfigFor, silent: Callable[[str], None]
) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    texts = [document(i) if i % 4 else None for i in range(120)]
    parquet.write_table(pa.table({"text": texts}), tmp_path / "p.parquet")
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("p.parquet", "saved", "z.jsonl.gz"):
        config = config_for(tmp_path / name, seq_length=16)
        prepared = prepare(config, report=silent)
        tokenizer = prepared.open_tokenizer()
        assert tokenizer is not None
        for shard in (*prepared.train, *prepared.validation):
            assert shard.origins
            assert shard.files == (str(tmp_path / name),)
            reader = IndexedReader(shard.prefix)
            for i, (_, number) in enumerate(read_origins(shard.origins, shard.origins_bytes).tolist()):
                assert tokenizer.decode(reader.document(i)) == f"{texts[number]}<|endoftext|>"


def test_a_damaged_file_of_origins_is_found(prepared_corpus: tuple[PreparedData, RunConfig]) -> None:
    prepared, config = prepared_corpus
    path = prepared.train[0].origins
    assert path is not None
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"train-0\.origins has checksum \w+; it was written with \w+ \(damaged\)"):
        prepare(config, report=lambda line: None)
    path.unlink()
    with pytest.raises(DataError, match=r"train-0\.origins is missing; remove .* to prepare it again"):
        prepare(config, report=lambda line: None)


def test_a_prepared_folder_can_be_moved(prepared_corpus: tuple[PreparedData, RunConfig], tmp_path: Path) -> None:
    prepared, config = prepared_corpus
    config.data.cache_dir = str(tmp_path / "moved")
    (tmp_path / "moved").mkdir()
    prepared.folder.rename(prepared_folder(config))
    moved = prepare(config, report=lambda line: None)
    assert moved.train[0] == replace(
        prepared.train[0],
        prefix=moved.folder / "train-0",
        sentences=moved.folder / "train-0.sentences",
        origins=moved.folder / "train-0.origins",
    )
