"""Sources of very unequal size: both are drawn, and what cannot work is said before anything is tokenised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.config.schema import ObjectiveName, RunConfig
from megatron_lite.data.samples.loader import training_dataset, validation_dataset
from megatron_lite.data.samples.sample_types import PairShape
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.errors import ConfigError, DataError
from tests.unit.data.conftest import document, windows

ConfigFor = Callable[..., RunConfig]
Silent = Callable[[str], None]


@pytest.fixture
def unequal(tmp_path: Path, corpus: Path, config_for: ConfigFor) -> RunConfig:
    """Thousands of tokens beside a dozen, which are fewer than one sample; validated on the larger source."""
    (tmp_path / "small.txt").write_text("a small domain of its own")
    return config_for([corpus, tmp_path / "small.txt"], validation_source=str(corpus), seq_length=64)


def test_a_source_shorter_than_a_sample_has_its_share(unequal: RunConfig, silent: Silent) -> None:
    prepared = prepare(unequal, report=silent)
    large, small = (shard.tokens for shard in prepared.train)
    assert small < 65 < large / 50
    dataset = training_dataset(prepared, unequal, windows(unequal))
    pieces = [dataset.stretches(i) for i in range(3 * (large + small) // small)]
    drawn = Counter(parts[0].shard.source_index for parts in pieces)
    assert abs(drawn[1] - len(pieces) * small / (large + small)) < 1
    for parts in pieces:
        assert sum(part.tokens for part in parts) == 65
    repeated = next(parts for parts in pieces if parts[0].shard.source_index == 1)
    assert len(repeated) == -(-65 // small)  # its one document, again and again
    assert {(part.document, part.first_token) for part in repeated} == {(0, 0)}


def test_no_sample_of_a_source_comes_twice_within_an_epoch(unequal: RunConfig, silent: Silent) -> None:
    unequal.data.weights = [1.0, 0.001]
    dataset = training_dataset(prepare(unequal, report=silent), unequal, windows(unequal))
    ends_after = dataset.samples_in(1)
    seen = [tuple(dataset.stretches(i)) for i in range(ends_after) if dataset.stretches(i)[0].shard.source_index == 0]
    assert len(set(seen)) == len(seen) > 50


def test_a_pass_over_a_repeated_source_is_counted_as_one(unequal: RunConfig, silent: Silent) -> None:
    """data.max_epochs counts passes, of which one sample of such a source takes several."""
    prepared = prepare(unequal, report=silent)
    small = prepared.train[1].tokens
    passes = -(-65 // small)
    dataset = training_dataset(prepared, unequal, windows(unequal))
    part = dataset.datasets[1]  # type: ignore[union-attr]
    assert [part.samples_in(epochs) for epochs in (passes - 1, passes, 2 * passes)] == [0, 1, 2]


def test_what_is_held_out_is_never_repeated(tmp_path: Path, unequal: RunConfig, silent: Silent) -> None:
    unequal.data.validation_source = [str(tmp_path / "corpus.txt"), str(tmp_path / "small.txt")]
    dataset = validation_dataset(prepare(unequal, report=silent), unequal, windows(unequal))
    assert {dataset.stretches(i)[0].shard.source_index for i in range(200)} == {0}


def test_a_corpus_without_one_sample_is_refused(tmp_path: Path, config_for: ConfigFor, silent: Silent) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"source {name}\n\nof two documents")
    config = config_for([tmp_path / "a.txt", tmp_path / "b.txt"], validation_fraction=0.5, seq_length=512)
    config.data.validation_source = str(tmp_path / "a.txt")
    prepared = prepare(config, report=silent)
    with pytest.raises(DataError, match=r"data\.seq_length=512 needs at least 513 training tokens; .*a\.txt has"):
        training_dataset(prepared, config, windows(config))


def test_a_source_without_pairs_can_be_left_out(corpus: Path, unequal: RunConfig, silent: Silent) -> None:
    corpus.write_text("\n\n".join(f"{document(i, 8)}. This is number {i}. It ends here." for i in range(60)))
    prepared, shape = prepare(unequal, report=silent), PairShape(64, 0.5, 0.1)
    with pytest.raises(DataError, match=r"small\.txt has 0 training documents .*or give it weight 0 in data\.weights"):
        training_dataset(prepared, unequal, shape)
    unequal.data.weights = [1.0, 0.0]
    assert training_dataset(prepare(unequal, report=silent), unequal, shape).sample(0).first.size


def test_any_ratio_of_weights_is_kept(unequal: RunConfig, silent: Silent) -> None:
    unequal.data.weights = [1.0, 1e-9]
    dataset = training_dataset(prepare(unequal, report=silent), unequal, windows(unequal))
    first, second = (dataset._blend.index_of(1, i) for i in range(2))  # type: ignore[union-attr]
    assert second - first in (10**9 + 1, 10**9 + 2)
    assert dataset.stretches(first)[0].shard.source_index == 1


# --- what needs no tokens is said before any is made ---


def refused(config: RunConfig, error: type[Exception], message: str) -> None:
    said: list[str] = []
    with pytest.raises(error, match=message):
        prepare(config, report=said.append)
    assert said == []


def test_a_source_that_would_be_held_out_whole(tmp_path: Path, corpus: Path, config_for: ConfigFor) -> None:
    from megatron_lite.data.shards.tokenise import document_hash

    number = next(i for i in range(1000) if document_hash(document(i)) / 2**64 < 0.1)
    (tmp_path / "one.txt").write_text(document(number))
    config = config_for([corpus, tmp_path / "one.txt"])
    refused(config, DataError, r"data\.validation_fraction=0\.1 holds out every document of data\.source\[1\]=.*one\.t")
    config.data.validation_fraction = 0.001  # a smaller fraction, as it says
    config.data.source = [str(tmp_path / "one.txt"), str(corpus)]
    refused(config, DataError, r"data\.validation_fraction=0\.001 holds out none of the 121 documents; use 0\.\d+ or m")


def test_nothing_held_out_and_the_fraction_that_is_proposed(corpus: Path, config_for: ConfigFor) -> None:
    config = config_for(corpus, validation_fraction=1e-9)
    said: list[str] = []
    with pytest.raises(DataError) as error:
        prepare(config, report=said.append)
    assert said == []
    config.data.validation_fraction = float(str(error.value).partition("; use ")[2].partition(" ")[0])
    assert prepare(config, report=said.append).validation_documents >= 1


def test_ready_shards_behind_a_text_are_checked_before_it_is_tokenised(
    tmp_path: Path, corpus: Path, config_for: ConfigFor, silent: Silent
) -> None:
    (tmp_path / "other.txt").write_text("\n\n".join(f"quite another {i}" for i in range(60)))
    made = prepare(config_for(corpus), report=silent)
    other = prepare(config_for(tmp_path / "other.txt"), report=silent)
    config = config_for([corpus, made.train[0].prefix], tokenizer=str(other.tokenizer_dir))
    refused(config, DataError, r"data\.source\[1\]=.* was made with another tokenizer")
    (tmp_path / "cut.bin").write_bytes(b"\0" * 10)
    (tmp_path / "cut.idx").write_bytes(b"MMIDIDX")
    refused(config_for([corpus, tmp_path / "cut"], tokenizer=str(made.tokenizer_dir)), DataError, r"cut\.idx")


def test_a_vocabulary_too_large_for_the_model_is_refused_before_tokenising(corpus: Path, config_for: ConfigFor) -> None:
    said: list[str] = []
    with pytest.raises(ConfigError, match=r"model\.vocab_size=400 must hold the 510 tokens"):
        prepare(config_for(corpus, vocab_size=400), report=said.append)
    assert not [line for line in said if line.startswith("tokenised")]


def test_weights_are_exact_shares_of_the_tokens(unequal: RunConfig, silent: Silent) -> None:
    prepared = prepare(unequal, report=silent)
    assert sum(prepared.weights) == 1
    assert np.prod([share.denominator for share in prepared.weights]) > 1
    assert prepared.weights[1] * prepared.train_tokens == prepared.train[1].tokens
    assert unequal.objective.name is ObjectiveName.causal_lm
