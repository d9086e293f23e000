"""The text behind ids, and where words begin."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_lite.data.tokenizer.pieces import BYTE_OF_LETTER, Pieces, Style, read_pieces

WORDPIECE = {"type": "WordPiece", "continuing_subword_prefix": "##", "unk_token": "[UNK]"}


def spec(model: dict[str, Any], pieces: list[str], decoder: str | None = None, added: Any = ()) -> dict[str, Any]:
    model = {**model, "vocab": {text: i for i, text in enumerate(pieces)}}
    return {"model": model, "decoder": decoder and {"type": decoder}, "pre_tokenizer": None, "added_tokens": added}


def begins(pieces: Pieces) -> dict[str, bool]:
    found = pieces.begins_word()
    assert found is not None
    return dict(zip(pieces.texts, found.tolist(), strict=True))


def test_alphabet_of_bytes_is_that_of_the_library() -> None:
    from tokenizers import pre_tokenizers

    assert set(BYTE_OF_LETTER) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_OF_LETTER.values()) == list(range(256))
    assert [BYTE_OF_LETTER[letter] for letter in "ĠĊA"] == [32, 10, 65]


def test_byte_level() -> None:
    names = ["Ġthe", "ing", "Ċ", "ĊĠĠ", ".", "'s", "_x", "é", "Ã©", "æ¼¢", "æ¼", "Ġ", "9"]
    pieces = read_pieces(spec({"type": "BPE"}, names, "ByteLevel"), len(names), [])
    assert pieces.style is Style.spaces
    assert pieces.texts == [" the", "ing", "\n", "\n  ", ".", "'s", "_x", "\ufffd", "é", "漢", "\ufffd", " ", "9"]
    assert begins(pieces) == {
        **dict.fromkeys([" the", "\n", "\n  ", ".", "'s", "_x", "漢", " "], True),
        **dict.fromkeys(["ing", "\ufffd", "é", "9"], False),
    }


def test_metaspace_and_byte_fallback() -> None:
    names = ["▁the", "ing", "<0x0A>", "<0xC3>", "▁", "."]
    for decoder in ("Metaspace", None):
        pieces = read_pieces(spec({"type": "Unigram"}, names, decoder), len(names), [])
        assert pieces.texts == [" the", "ing", "\n", "\ufffd", " ", "."]
        assert begins(pieces) == {" the": True, "ing": False, "\n": True, "\ufffd": False, " ": True, ".": True}


def test_wordpiece() -> None:
    names = ["[UNK]", "[unused7]", "the", "##ing", ".", "##."]
    pieces = read_pieces(spec(WORDPIECE, names), len(names), [])
    assert pieces.texts == ["[UNK]", "", "the", "ing", ".", "."]
    assert pieces.is_special.tolist() == [False, True, False, False, False, False]
    found = pieces.begins_word()
    assert found is not None
    assert found.tolist() == [True, True, True, False, True, False]


def test_special_tokens_added_tokens_and_gaps() -> None:
    added = [
        {"id": 3, "content": "<tool>", "special": True},
        {"id": 4, "content": "  indent", "special": False},
        {"id": 1, "content": "b", "special": False},
    ]
    pieces = read_pieces(spec({"type": "BPE"}, ["a", "b"], "ByteLevel", added), 6, roles=[1])
    assert pieces.texts == ["a", "", "", "", "  indent", ""]
    assert pieces.is_special.tolist() == [False, True, True, True, False, True]


def test_endings_tell_no_beginnings() -> None:
    pieces = read_pieces(spec({"type": "BPE", "end_of_word_suffix": "</w>"}, ["a</w>", "b"]), 2, [])
    assert pieces.texts == ["a", "b"]
    assert pieces.begins_word() is None


@pytest.mark.parametrize("text", ["whole", "##words"])
def test_words(text: str) -> None:
    pieces = read_pieces(spec({"type": "WordLevel"}, [text]), 1, [])
    assert begins(pieces) == {text: True}
