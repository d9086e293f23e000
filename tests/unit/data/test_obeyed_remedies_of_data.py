"""Errors of preparing and reading data: following their remedies works."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.config.frozen import freeze
from megatron_lite.config.schema import ObjectiveName, RunConfig
from megatron_lite.data import publish
from megatron_lite.data.__main__ import main
from megatron_lite.data.corpus import embedded
from megatron_lite.data.corpus.source_names import resolve_source
from megatron_lite.data.corpus.sources import identity
from megatron_lite.data.samples.loader import training_dataset
from megatron_lite.data.samples.provenance import Provenance
from megatron_lite.data.samples.sample_types import PairShape, WindowShape
from megatron_lite.data.shards import prepared as prepared_module
from megatron_lite.data.shards.arrays import map_array
from megatron_lite.data.shards.origins import ORIGIN_DTYPE
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.data.shards.prepared import COUNTS, PreparedData, Shard
from megatron_lite.data.tokenizer.bpe import train_bpe
from megatron_lite.data.tokenizer.encoding import Encoder
from megatron_lite.data.tokenizer.needs import add_tokens
from megatron_lite.data.tokenizer.tokenizer import open_tokenizer
from megatron_lite.errors import ConfigError, DataError
from tests.tokenizer_families import FAMILIES
from tests.unit.data.conftest import document
from tests.unit.remedies import obeys

ConfigFor = Callable[..., RunConfig]
Silent = Callable[[str], None]
Prepared = tuple[PreparedData, RunConfig]
SHAPES = (WindowShape(tokens=17, stride=16), PairShape(32, 0.5, 0.1))


@pytest.fixture
def unverified(corpus: Path, config_for: ConfigFor, silent: Silent, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    """Prepared sentences, whose files count as too large to verify at every start."""
    corpus.write_text("\n\n".join(f"{document(i, 8)}. This is number {i}. It ends here." for i in range(60)))
    monkeypatch.setattr(prepared_module, "CHEAP_CHECKSUM_BYTES", -1)
    config = config_for(corpus)
    config.objective.name = ObjectiveName.masked_lm_nsp
    return prepare(config, report=silent), config


def read_all(config: RunConfig) -> None:
    prepared = prepare(config, report=lambda line: None)
    for shape in SHAPES:
        provenance = Provenance.of(prepared, config, shape)
        for index in range(20):
            provenance.dataset.sample(index)
            provenance.documents(index)


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises((ConfigError, DataError)) as error:
        action()
    return str(error.value)


def remove_named_folder(message: str) -> None:
    told = re.search(r"; remove (\S+) to prepare it again$", message)
    assert told is not None, message
    shutil.rmtree(told[1])


def overwrite(path: Path, values: np.ndarray) -> None:
    """Damage that leaves the size of a file as it was."""
    assert values.nbytes == path.stat().st_size
    path.write_bytes(values.tobytes())


def of_ids(shard: Shard) -> None:
    overwrite(shard.prefix.with_name("train-0.bin"), np.full(shard.bin_bytes // 2, 60_000, np.uint16))


def of_sentences(shard: Shard) -> None:
    assert shard.sentences is not None
    overwrite(shard.sentences, np.frombuffer(shard.sentences.read_bytes(), np.int64)[::-1].copy())


def of_origins(shard: Shard) -> None:
    assert shard.origins is not None
    overwrite(shard.origins, np.full(shard.origins_bytes // ORIGIN_DTYPE.itemsize, 7, ORIGIN_DTYPE))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (of_ids, r"train-0\.bin is damaged: it holds token ids outside 0 to \d+, the range when it was written"),
        (of_sentences, r"train-0\.sentences is damaged: sentence positions are not in ascending order"),
        (of_origins, r"train-0\.origins is damaged: it names file 7 of 1"),
    ],
)
@obeys("megatron_lite/data/samples/dataset.py:checked_ids", "megatron_lite/data/samples/provenance.py:_part")
@obeys("megatron_lite/data/samples/dataset.py:damaged_sentences")
def test_damage_that_is_found_in_use(damage: Callable[[Shard], None], what: str, unverified: Prepared) -> None:
    prepared, config = unverified
    damage(prepared.train[0])
    message = refusal(lambda: read_all(config))
    assert re.search(what, message)
    for command in re.findall(r"`python -m megatron_lite\.data (inspect .*?)`", message):
        assert main(shlex.split(command)) == 2
    remove_named_folder(message)
    read_all(config)


@obeys("megatron_lite/data/samples/dataset.py:checked_ids")
def test_damaged_ids_of_a_copied_pair(
    tmp_path: Path, unverified: Prepared, config_for: ConfigFor, silent: Silent, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder is not ours: the command is for the pair, and nothing is to be removed."""
    made, _ = unverified
    folder = tmp_path / "of others"
    folder.mkdir()
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{made.train[0].prefix}{suffix}", folder)
    config = config_for(folder / "train-0")
    prepared = prepare(config, report=silent)
    of_ids(prepared.train[0])
    message = refusal(lambda: training_dataset(prepared, config, SHAPES[0]).sample(0))
    assert message.endswith("; copy the pair again from the original")
    command = re.findall(r"`python -m megatron_lite\.data (inspect .*?)`", message)[0]
    assert main(shlex.split(command)) == 2
    assert "train-0.bin has checksum " in capsys.readouterr().err
    shutil.copy(f"{made.train[0].prefix}.bin", folder)
    assert main(shlex.split(command)) == 0
    training_dataset(prepare(config, report=silent), config, SHAPES[0]).sample(0)


@obeys("megatron_lite/data/shards/arrays.py:map_array", "megatron_lite/data/shards/prepared.py:_read_counts")
def test_damage_after_the_check_of_a_start(prepared_corpus: Prepared, silent: Silent) -> None:
    prepared, config = prepared_corpus
    shard = prepared.train[0]
    assert shard.origins is not None
    for content in (b"", None):
        shard.origins.write_bytes(content) if content is not None else shard.origins.unlink()
        message = refusal(lambda: map_array(shard.origins, ORIGIN_DTYPE, shard.origins_bytes))
        assert message.endswith("; remove its folder to prepare it again")
        shutil.rmtree(shard.origins.parent)
        prepare(config, report=silent)
        assert len(map_array(shard.origins, ORIGIN_DTYPE, shard.origins_bytes)) == shard.documents
    (prepared.folder / COUNTS).write_bytes(b"PK")
    remove_named_folder(refusal(lambda: prepared_module._read_counts(prepared.folder, 1, 1)))
    prepare(config, report=silent)
    assert len(prepared_module._read_counts(prepared.folder, 1, 1)) == 2


@obeys(
    "megatron_lite/data/tokenizer/saved_tokenizer.py:_fitting_flags",
    "megatron_lite/data/tokenizer/saved_tokenizer.py:saved_files",
)
def test_a_damaged_tokenizer_of_prepared_data(prepared_corpus: Prepared, silent: Silent) -> None:
    prepared, config = prepared_corpus
    config.objective.name = ObjectiveName.masked_lm
    assert prepared.tokenizer_dir is not None
    file = prepared.tokenizer_dir / "tokenizer.json"
    unknown = json.dumps(json.loads(file.read_text()) | {"pre_tokenizer": {"type": "Unknown"}})
    for content in (None, "{", unknown):
        file.write_text(content) if content is not None else file.unlink()
        message = refusal(lambda: prepared.tokenizer_files(config))
        assert str(file) in message
        remove_named_folder(message)
        assert prepare(config, report=silent).tokenizer_files(config)


@obeys("megatron_lite/data/tokenizer/tokenizer_files.py:_require_settings")
def test_damaged_sampling_settings(tmp_path: Path, corpus: Path, config_for: ConfigFor) -> None:
    """Refused before the texts are read: the prepared folder would keep the damaged file."""
    folder = FAMILIES["smollm_chat"](tmp_path / "t")
    config, file = config_for(corpus, tokenizer=str(folder)), folder / "generation_config.json"
    whole, said = file.read_bytes(), []
    for content in (b"{", b"[1]", b"\0" * 9):
        file.write_bytes(content)
        message = refusal(lambda: prepare(config, report=said.append))
        assert message.startswith(f"data.tokenizer={folder} cannot be opened: {file} is damaged: ")
        assert message.endswith("; restore that file, or remove it")
        assert said == []
    file.unlink()
    assert "generation_config.json" not in open_tokenizer(str(folder)).files.others
    file.write_bytes(whole)
    assert prepare(config, report=said.append).tokenizer_files(config)["generation_config.json"] == whole


@obeys("megatron_lite/data/publish.py:publish_folder")
def test_a_file_system_without_locks(tmp_path: Path, silent: Silent, monkeypatch: pytest.MonkeyPatch) -> None:
    def publish_in(folder: Path) -> None:
        key = f"data.cache_dir={folder}"
        build = lambda temporary: (temporary / "marker").touch()  # noqa: E731
        publish.publish_folder(folder / "x", build, key=key, report=silent, marker="marker")

    lock = publish.FileLock

    def only_elsewhere(path: Path) -> object:
        if path.is_relative_to(tmp_path / "network"):
            raise NotImplementedError
        return lock(path)

    monkeypatch.setattr(publish, "FileLock", only_elsewhere)
    message = refusal(lambda: publish_in(tmp_path / "network"))
    assert message.endswith("; name a folder on another file system")
    publish_in(tmp_path / "local")
    assert (tmp_path / "local" / "x" / "marker").is_file()


@obeys("megatron_lite/data/corpus/embedded.py:embedded_files")
def test_an_interpreter_without_sources(
    tmp_path: Path, corpus: Path, config_for: ConfigFor, silent: Silent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    assert refusal(embedded.embedded_files).endswith("; name your own text in data.source")
    assert prepare(config_for(corpus), report=silent).train_documents


@obeys("megatron_lite/data/corpus/sources.py:identity")
def test_a_file_that_vanishes_before_it_is_identified(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x")
    gone, other = (resolve_source(str(tmp_path / name), "data.source") for name in ("a.txt", "b.txt"))
    gone.paths[0].unlink()
    data = RunConfig().data
    message = refusal(lambda: identity(gone, data, lambda path: [path.stat().st_size]))
    assert message.endswith("; correct its permissions, or name another file")
    assert identity(other, data, lambda path: [path.stat().st_size])["content"] == [[1]]


@obeys("megatron_lite/data/tokenizer/bpe.py:train_bpe", "megatron_lite/data/tokenizer/encoding.py:__init__")
def test_text_and_tokenizers_that_the_library_refuses(tmp_path: Path) -> None:
    message = refusal(lambda: train_bpe(["a\ud800"], 400, tmp_path / "trained"))
    assert message.endswith("; name an existing tokenizer in data.tokenizer")
    existing = FAMILIES["gpt2"](tmp_path / "t")
    assert open_tokenizer(str(existing)).encode("a")
    spec = json.loads((existing / "tokenizer.json").read_text())
    unknown = spec | {"pre_tokenizer": {"type": "Unknown"}}
    message = refusal(lambda: Encoder(unknown, {0: "<|endoftext|>"}, 0, "t"))
    assert message.endswith("; name another tokenizer")
    assert Encoder(spec, {0: "<|endoftext|>"}, 0, "another").encode(["a"])


@obeys(
    "megatron_lite/data/tokenizer/needs.py:require_tokens_of_run", "megatron_lite/data/tokenizer/needs.py:add_tokens"
)
@obeys("megatron_lite/data/tokenizer/needs.py:require_tokens")
def test_shards_that_came_without_a_tokenizer(
    tmp_path: Path, prepared_corpus: Prepared, config_for: ConfigFor, silent: Silent
) -> None:
    made, _ = prepared_corpus
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{made.train[0].prefix}{suffix}", tmp_path / f"pair{suffix}")
    masked = config_for(tmp_path / "pair", vocab_size=600, mask_loss_after_eod=True)
    filled = replace(masked, data=replace(masked.data, mask_loss_after_eod=False))
    filled.objective = replace(masked.objective, name=ObjectiveName.fill_in_the_middle)
    for config in (masked, filled):
        message = refusal(lambda config=config: prepare(config, report=silent))
        assert message.endswith("; name its folder in data.tokenizer")
        config.data.tokenizer = str(made.tokenizer_dir)
        assert prepare(config, report=silent).eod_id == 0
    message = refusal(lambda: add_tokens("train", tmp_path / "new", "masked_lm"))
    assert message.endswith("; name a folder, such as `tokenizer` in prepared data")
    assert add_tokens(str(made.folder / "tokenizer"), tmp_path / "new", "masked_lm")[0] == []


@obeys("megatron_lite/data/__main__.py:_config_to_prepare")
def test_a_frozen_configuration_beside_overrides(
    tmp_path: Path, corpus: Path, config_for: ConfigFor, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(corpus)
    config.train.run_dir = str(tmp_path)
    frozen = ["--config", str(freeze(config, tmp_path))]
    words = [f"data.{key}={getattr(config.data, key)}" for key in ("source", "cache_dir", "validation_fraction")]
    words.append("data.tokenizer_vocab_size=510")
    assert main(["prepare", *frozen, *words]) == 2
    assert "would change it; omit one of them" in capsys.readouterr().err
    assert main(["prepare", *frozen]) == 0
    assert main(["prepare", *words]) == 0
