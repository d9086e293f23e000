"""The same data under another name is the same data: nothing is prepared again, and a run goes on with it."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lite.checkpoint.resume import Trained, allowed_changes
from megatron_lite.config.changes import Grade
from megatron_lite.config.schema import RunConfig
from megatron_lite.data.samples.loader import training_dataset
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.data.shards.prepared import PreparedData, load_prepared
from megatron_lite.errors import CheckpointError, ConfigError, DataError
from tests.unit.data.conftest import document, windows

ConfigFor = Callable[..., RunConfig]
Silent = Callable[[str], None]


def dotted(path: Path) -> str:
    return f"{path.parent}/./{path.name}"


def climbing(path: Path) -> str:
    return f"{path.parent}/../{path.parent.name}/{path.name}"


def relative(path: Path) -> str:
    return os.path.relpath(path)


def linked(path: Path) -> str:
    link = path.with_name("link" + path.suffix)
    link.symlink_to(path)
    return str(link)


def listed(path: Path) -> list[Path]:
    return [path]


def matched(path: Path) -> str:
    return f"{path.parent}/corp*{path.suffix}"


def copied(path: Path) -> str:
    other = path.parent / "elsewhere" / f"renamed{path.suffix}"
    other.parent.mkdir()
    shutil.copyfile(path, other)
    return str(other)


def moved(path: Path) -> str:
    return str(path.rename(path.with_name(f"moved{path.suffix}")))


NAMES = [dotted, climbing, relative, linked, listed, matched, copied, moved]


def changes_of(before: tuple[PreparedData, RunConfig], after: tuple[PreparedData, RunConfig]) -> list[str]:
    """Settings that differ between two attempts of one run; none of them may forbid the second."""
    changes = allowed_changes(Trained(before[1], before[0].fingerprint), after[1], after[0].fingerprint, "R", None)
    assert {change.grade for change in changes} <= {Grade.safe}
    return [change.key for change in changes]


@pytest.mark.parametrize("name", NAMES)
def test_another_name_of_a_text(
    prepared_corpus: tuple[PreparedData, RunConfig], corpus: Path, config_for: ConfigFor, name: Callable[[Path], object]
) -> None:
    said: list[str] = []
    config = config_for(name(corpus))
    prepared = prepare(config, report=said.append, earlier=prepared_corpus[1])
    assert (said, prepared.folder) == ([], prepared_corpus[0].folder)  # nothing is tokenised
    assert changes_of(prepared_corpus, (prepared, config)) == ["data.source"]


@pytest.mark.parametrize("name", [dotted, relative, listed, moved])
def test_another_name_of_ready_shards(
    prepared_corpus: tuple[PreparedData, RunConfig],
    tmp_path: Path,
    config_for: ConfigFor,
    silent: Silent,
    name: Callable[[Path], object],
) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copyfile(f"{prepared_corpus[0].train[0].prefix}{suffix}", tmp_path / f"pair{suffix}")
    first = config_for(tmp_path / "pair", vocab_size=510)
    before = prepare(first, report=silent)
    named = name(tmp_path / "pair.bin")
    if name is moved:
        (tmp_path / "pair.idx").rename(tmp_path / "moved.idx")
    second = config_for(named, vocab_size=510)
    said: list[str] = []
    after = prepare(second, report=said.append)
    assert (said, after.folder) == ([], before.folder)
    assert changes_of((before, first), (after, second)) == ["data.source"]
    assert len(training_dataset(after, second, windows(second)).sample(3).tokens) == 17
    assert after.train[0].prefix.name == ("moved" if name is moved else "pair")


def test_another_name_of_the_tokenizer_and_the_validation_source(
    prepared_corpus: tuple[PreparedData, RunConfig], corpus: Path, config_for: ConfigFor, silent: Silent
) -> None:
    tokenizer = corpus.parent / "tok"
    shutil.copytree(prepared_corpus[0].tokenizer_dir or "", tokenizer)
    first = config_for(corpus, tokenizer=str(tokenizer), validation_source=str(corpus))
    before = prepare(first, report=silent)
    other = tokenizer.rename(corpus.parent / "moved_tok")
    second = config_for(corpus, tokenizer=f"{other}/", validation_source=[copied(corpus)])
    said: list[str] = []
    after = prepare(second, report=said.append)
    assert said == []
    assert changes_of((before, first), (after, second)) == ["data.tokenizer", "data.validation_source"]


def test_the_same_text_in_another_container(
    prepared_corpus: tuple[PreparedData, RunConfig], corpus: Path, config_for: ConfigFor, silent: Silent
) -> None:
    packed = corpus.with_name("corpus.txt.gz")
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    config = config_for(packed)
    prepared = prepare(config, report=silent, earlier=prepared_corpus[1])
    assert changes_of(prepared_corpus, (prepared, config)) == ["data.source"]


def test_settings_that_read_nothing_else_are_safe(
    prepared_corpus: tuple[PreparedData, RunConfig], corpus: Path, config_for: ConfigFor, silent: Silent
) -> None:
    config = config_for(corpus, text_key="body", weights=[3.0])
    assert changes_of(prepared_corpus, (prepare(config, report=silent), config)) == ["data.weights", "data.text_key"]


@pytest.fixture
def two(corpus: Path, tmp_path: Path) -> list[Path]:
    (tmp_path / "second.txt").write_text("\n\n".join(document(i) for i in range(200, 260)))
    return [corpus, tmp_path / "second.txt"]


@pytest.mark.parametrize("weights", [[2.0, 4.0], [0.1, 0.2]])
def test_weights_in_another_unit(two: list[Path], config_for: ConfigFor, silent: Silent, weights: list[float]) -> None:
    first, second = config_for(two, weights=[1.0, 2.0]), config_for(two, weights=weights)
    before, after = prepare(first, report=silent), prepare(second, report=silent)
    assert changes_of((before, first), (after, second)) == ["data.weights"]


CHANGES = [
    ("data.source", {}),  # in another order
    ("data.weights", {"weights": [1.0, 3.0]}),
    ("data.document_separator", {"document_separator": " "}),
    ("data.validation_fraction", {"validation_fraction": 0.3}),
    ("data.tokenizer_vocab_size", {"tokenizer_vocab_size": 450}),
]


@pytest.mark.parametrize(("key", "settings"), CHANGES)
def test_other_tokens_or_another_order_stay_forbidden(
    two: list[Path], config_for: ConfigFor, silent: Silent, key: str, settings: dict[str, object]
) -> None:
    first = config_for(two, weights=[1.0, 2.0])
    second = config_for(two if settings else two[::-1], **{"weights": [1.0, 2.0], **settings})
    before, after = prepare(first, report=silent), prepare(second, report=silent)
    with pytest.raises(CheckpointError) as error:
        allowed_changes(Trained(first, before.fingerprint), second, after.fingerprint, "R", Path("R/step_1"))
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{key}=")
    assert f"keep {key}=" in line


def test_a_trained_tokenizer_and_its_folder_are_not_the_same(
    prepared_corpus: tuple[PreparedData, RunConfig], corpus: Path, config_for: ConfigFor, silent: Silent
) -> None:
    """A size asked for and not reached makes the model larger than the tokenizer: the weights do not fit."""
    before, first = prepared_corpus
    second = config_for(corpus, tokenizer=str(before.tokenizer_dir))
    after = prepare(second, report=silent)
    assert after.fingerprint == before.fingerprint
    with pytest.raises(CheckpointError, match=r"data\.tokenizer=.* cannot continue from train"):
        changes_of((before, first), (after, second))


def test_other_text_is_refused_before_it_is_tokenised(
    prepared_corpus: tuple[PreparedData, RunConfig], two: list[Path], config_for: ConfigFor
) -> None:
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"data\.source=.*second\.txt cannot continue from .*; keep data\.source="):
        prepare(config_for(two[1]), report=said.append, earlier=prepared_corpus[1])
    assert said == []
    two[0].unlink()  # nothing to compare with any more: the tokens will show it
    assert prepare(config_for(two[1]), report=said.append, earlier=prepared_corpus[1]).train_documents > 0


def test_a_pair_that_is_gone_is_named(
    prepared_corpus: tuple[PreparedData, RunConfig], tmp_path: Path, config_for: ConfigFor, silent: Silent
) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copyfile(f"{prepared_corpus[0].train[0].prefix}{suffix}", tmp_path / f"pair{suffix}")
    config = config_for(tmp_path / "pair", vocab_size=510)
    folder = prepare(config, report=silent).folder
    (tmp_path / "pair.bin").unlink()
    with pytest.raises(DataError, match=r"pair\.bin is missing; copy it again from the original"):
        load_prepared(folder, config)
