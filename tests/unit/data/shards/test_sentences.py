"""Where sentences begin, on token ids of several kinds of vocabularies, and the file that says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.shards import tokenise
from megatron_lite.data.shards.indexed import IndexedReader, IndexedWriter, idx_path
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.data.shards.prepared import PreparedData, Shard
from megatron_lite.data.shards.sentences import LONG_SENTENCE, Kinds, read_sentences, sentence_kinds, sentence_starts
from megatron_lite.data.tokenizer.bpe import train_bpe
from megatron_lite.data.tokenizer.pieces import read_pieces
from megatron_lite.data.tokenizer.tokenizer import Tokenizer
from megatron_lite.errors import DataError

ConfigFor = Callable[..., RunConfig]
PROSE = [
    "Then J. Smith left, e.g. The end. (Really.) No? Yes!\nNext one… Él… Él.",
    '你好。我是人！对吗？「是。」好 He said "go." Ok',  # noqa: RUF001
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe(iter(PROSE * 30), 600, tmp_path_factory.mktemp("tokenizer"))


def sentences_of(tokenizer: Tokenizer, text: str) -> list[str]:
    tokens, lengths = tokenizer.encode_documents([text])
    starts = np.flatnonzero(sentence_starts(tokens, lengths, sentence_kinds(tokenizer.pieces())))
    assert starts[0] == 0
    return [tokenizer.decode(part).removesuffix("<|endoftext|>") for part in np.split(tokens, starts[1:])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two", ["One.", " Two"]),
        ("One.Two. three", ["One.Two. three"]),
        ("Go! No? 3 left… Él", ["Go!", " No?", " 3 left…", " Él"]),
        ('He said "go." Then', ['He said "go."', " Then"]),
        ('He (said "go.") Then', ['He (said "go.")', " Then"]),
        ('One. "Two', ["One.", ' "Two']),
        ("3.14 and v2.0 a.b", ["3.14 and v2.0 a.b"]),
        ("J. Smith, e.g. The U.S. Army", ["J. Smith, e.g. The U.S. Army"]),
        ("One.\nTwo\nthree", ["One.\n", "Two\nthree"]),
        ("Title\n\ntext", ["Title\n\n", "text"]),
        ("Title\n  \n  text", ["Title\n  \n ", " text"]),
        ("\n\nTitle. \n\n", ["\n\nTitle. \n\n"]),
        ("对吗？「是。」好。 ", ["对吗？「", "是。」", "好。 "]),  # noqa: RUF001
        ("", [""]),
    ],
)
def test_rule(bpe: Tokenizer, text: str, expected: list[str]) -> None:
    found = sentences_of(bpe, text)
    assert [part.strip() for part in found] == [part.strip() for part in expected]
    assert "".join(found) == text
    for part in found[1:]:  # a space goes with the next word where they are one token, everything else stays behind
        assert part.removeprefix(" ")[:1].strip()


def test_source_code_is_cut_at_blank_lines_and_long_blocks_at_lines(bpe: Tokenizer) -> None:
    block = "".join(f"x{i} = call(y)\n" for i in range(80))
    first, *rest, last = sentences_of(bpe, "import a\n\n\n" + block)
    assert first == "import a\n\n\n"
    assert "".join([*rest, last]) == block
    assert len(rest) > 5
    for part in rest:
        assert part.endswith("\n")
        assert LONG_SENTENCE / 2 < len(bpe.encode(part)) < 2 * LONG_SENTENCE
    assert sentences_of(bpe, "a" * 5000) == ["a" * 5000]  # no line ends


@pytest.mark.parametrize("cased", [True, False])
def test_wordpiece_goes_by_punctuation(cased: bool) -> None:
    words = ["the", "end", "##s", ".", '"', "(", "so", "3", "14", "e", "g", ")", "[SEP]", *(["The"] if cased else [])]
    model = {"type": "WordPiece", "continuing_subword_prefix": "##", "vocab": {w: i for i, w in enumerate(words)}}
    kinds = sentence_kinds(read_pieces({"model": model}, len(words), [12]))
    text = f"the end ##s . ( so . ) {'The' if cased else 'the'} 3 . 14 e . g . so . [SEP]"
    tokens = np.array([words.index(word) for word in text.split(" ")])
    starts = np.flatnonzero(sentence_starts(tokens, np.array([len(tokens)]), kinds))
    assert [text.split(" ")[i] for i in starts] == ["the", "(", "The" if cased else "the"]


def test_a_piece_that_reaches_over_the_boundary() -> None:
    vocab = {text: i for i, text in enumerate(["Aa", ".ĊĊ", "b", "ĠC", "!Ċ"])}
    kinds = sentence_kinds(read_pieces({"model": {"vocab": vocab}, "decoder": {"type": "ByteLevel"}}, 5, []))
    tokens = np.array([0, 1, 2, 1, 3, 4, 2, 4, 0])
    assert np.flatnonzero(sentence_starts(tokens, np.array([9]), kinds)).tolist() == [0, 2, 4, 8]


def test_documents_do_not_see_each_other(bpe: Tokenizer) -> None:
    kinds = sentence_kinds(bpe.pieces())
    texts = ["\n\nOne. Two.", "", "three", "\n\n", "Four.\n\n\n", *PROSE, "x\n" * 200]
    tokens, lengths = bpe.encode_documents(texts)
    alone = [sentence_starts(*bpe.encode_documents([text]), kinds) for text in texts]
    assert np.array_equal(sentence_starts(tokens, lengths, kinds), np.concatenate(alone))
    empty = np.insert(lengths, [0, 3, len(lengths)], 0)
    assert np.array_equal(sentence_starts(tokens, empty, kinds), np.concatenate(alone))


def starts_of(shard: Shard) -> np.ndarray:
    assert shard.sentences is not None
    return read_sentences(shard.sentences, shard.sentences_bytes)


def recomputed(prefix: Path, kinds: Kinds) -> np.ndarray:
    reader = IndexedReader(prefix)
    return np.flatnonzero(sentence_starts(reader.tokens, reader.document_lengths, kinds))


def test_stored_beside_the_shards(
    tmp_path: Path, corpus: Path, config_for: ConfigFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.txt").write_text("\n\n".join(f"Doc {i}. It has. Three sentences." for i in range(90)))
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 300)  # places go on from batch to batch
    prepared = prepare(config_for(tmp_path / "x.txt"), report=lambda line: None)
    tokenizer = prepared.open_tokenizer()
    assert tokenizer is not None
    for shard in (*prepared.train, *prepared.validation):
        assert shard.sentences == Path(f"{shard.prefix}.sentences")
        starts = starts_of(shard)
        assert len(starts) == 3 * shard.documents
        assert np.array_equal(starts, recomputed(shard.prefix, sentence_kinds(tokenizer.pieces())))
        assert np.isin(IndexedReader(shard.prefix).document_starts, starts).all()


def test_ready_shards_get_theirs_in_the_prepared_folder(
    prepared_corpus: tuple[PreparedData, RunConfig], config_for: ConfigFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = prepared_corpus
    monkeypatch.setattr("megatron_lite.data.shards.ready.CHUNK_TOKENS", 100)
    prepared = prepare(config_for(made.train[0].prefix), report=lambda line: None)
    (train,), (validation,) = prepared.train, prepared.validation
    assert train.sentences == validation.sentences == prepared.folder / "train-0.sentences"
    assert np.array_equal(starts_of(train), starts_of(made.train[0]))


def test_shards_without_tokenizer_have_none(tmp_path: Path, config_for: ConfigFor) -> None:
    writer = IndexedWriter(tmp_path / "x", np.uint16)
    writer.add(np.arange(60) % 9, np.full(20, 3))
    writer.finish()
    prepared = prepare(config_for(tmp_path / "x", vocab_size=9), report=lambda line: None)
    assert prepared.train[0].sentences is None
    assert not list(prepared.folder.glob("*.sentences"))


def test_documents_that_megatron_split_into_sentences(tmp_path: Path, config_for: ConfigFor) -> None:
    writer = IndexedWriter(tmp_path / "x", np.uint16)
    lengths = np.array([3, 2, 0, 4, 1] * 12)
    writer.add(np.arange(lengths.sum()) % 9, lengths)
    writer.finish()
    index = bytearray(idx_path(tmp_path / "x").read_bytes())
    bounds = np.arange(0, 61, 5, dtype="<i8")  # 12 documents of 5 sequences
    index[26:34] = np.array([len(bounds)], "<u8").tobytes()
    idx_path(tmp_path / "x").write_bytes(bytes(index[: -8 * 61]) + bounds.tobytes())
    prepared = prepare(config_for(tmp_path / "x", vocab_size=9, validation_fraction=0.3), report=lambda line: None)
    assert prepared.train_documents + prepared.validation_documents == 12
    starts = starts_of(prepared.train[0])
    assert np.array_equal(starts, np.unique(np.cumsum(lengths) - lengths)[: len(starts)])
    assert len(starts) == 48


def test_sentences_belong_to_the_fingerprint_and_are_verified(
    prepared_corpus: tuple[PreparedData, RunConfig],
) -> None:
    prepared, config = prepared_corpus
    path = prepared.train[0].sentences
    assert path is not None
    content = path.read_bytes()
    path.write_bytes(content[:-8] + b"\x01" * 8)
    with pytest.raises(DataError, match=r"train-0\.sentences has checksum \w+; it was written with \w+ \(damaged\)"):
        prepare(config, report=lambda line: None)
    path.write_bytes(content[:-8])
    with pytest.raises(DataError) as error:
        prepare(config, report=lambda line: None)
    assert str(error.value) == (
        f"{path} is {len(content) - 8:,} bytes; prepared.json expects {len(content):,} (truncated); remove "
        f"{prepared.folder} to prepare it again"
    )
    with pytest.raises(DataError, match=r"train-0\.sentences is [\d,]+ bytes; [\d,]+ were written"):
        starts_of(prepared.train[0])
    path.unlink()
    with pytest.raises(DataError, match=r"train-0\.sentences is missing; remove .* to prepare it again"):
        prepare(config, report=lambda line: None)
    with pytest.raises(DataError, match=r"train-0\.sentences cannot be read: No such file"):
        starts_of(replace(prepared.train[0]))
