"""Training a tokenizer: linear in the text whatever it is, and never silent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from megatron_lite.data import progress_lines
from megatron_lite.data.progress_lines import ProgressLines
from megatron_lite.data.tokenizer import bpe
from megatron_lite.data.tokenizer.bpe import LONGEST_WORD, in_short_words, train_bpe
from tests.unit.data.conftest import document

TEXTS = [document(i) for i in range(60)]
RUNS = st.tuples(st.sampled_from(["a", " ", "\n", "7", "-", "漢", "ab", " x", "\t\n", "é"]), st.integers(1, 3000))


def longest_word(texts: list[str]) -> int:
    """In what the trainer counts, by its own rule."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    return max((end - start for text in texts for _, (start, end) in split(text)), default=0)


@given(runs=st.lists(RUNS, max_size=6))
@settings(max_examples=60, deadline=None)
def test_no_word_is_long_and_no_text_is_lost(runs: list[tuple[str, int]]) -> None:
    """The trainer's time is at most in proportion to the text times its longest word."""
    text = "".join(part * count for part, count in runs)
    parts = list(in_short_words([text, "x", text]))
    assert "".join(parts) == text + "x" + text
    assert longest_word(parts) <= LONGEST_WORD + 1  # with the space ahead


@pytest.mark.parametrize("length", [20_000, 80_000, 320_000])
def test_a_run_of_one_letter_becomes_one_word_as_often_as_it_is_long(length: int) -> None:
    """The trainer counts equal words once: its work beside reading does not grow at all."""
    parts = list(in_short_words(["a" * length]))
    assert len(parts) == -(-length // LONGEST_WORD)
    assert len(set(parts)) <= 2


def test_text_of_ordinary_words_is_handed_on_as_it_is() -> None:
    assert list(in_short_words(TEXTS)) == TEXTS


def test_a_vocabulary_of_one_long_line(tmp_path: Path) -> None:
    trained = train_bpe(["a" * 100_000, *TEXTS], 490, tmp_path)
    assert trained.decode(trained.encode("a" * 3000)) == "a" * 3000
    assert len(trained.encode("a" * 1024)) <= 4  # pairs of pairs of them are learned


def test_training_reports_while_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_lines, "REPORT_SECONDS", 0.001)
    lines: list[str] = []
    told = threading.Event()

    def report(line: str) -> None:
        lines.append(line)
        told.set()

    def texts() -> Iterator[str]:
        yield TEXTS[0]
        assert told.wait(60)  # the trainer is busy with one text; the line comes all the same
        yield from TEXTS[1:]

    train_bpe(texts(), 490, tmp_path, report=report)
    assert lines[0].startswith("tokenizer: reading, 0.0 M characters, ")
    assert lines[-1].startswith("tokenizer: trained, 0.0 M characters, ")


def test_no_line_follows_a_failure() -> None:
    lines: list[str] = []
    with (
        pytest.raises(ValueError, match="broken"),
        ProgressLines(lines.append, lambda seconds, is_done: "line"),
    ):
        raise ValueError("broken")
    assert lines == []


def test_the_words_of_the_trainer_are_bounded_where_it_gets_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    handed: list[str] = []
    whole = bpe.in_short_words

    def seen(texts: Iterator[str]) -> Iterator[str]:
        for text in whole(texts):
            handed.append(text)
            yield text

    monkeypatch.setattr(bpe, "in_short_words", seen)
    train_bpe(["b" * 5000, "c" * 9000 + " d"], 490, tmp_path)
    assert longest_word(handed) <= LONGEST_WORD + 1
