"""The text of every token id: where words begin, and which ids never encode text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import numpy as np
import numpy.typing as npt

SPACE_SIGN = "▁"  # SentencePiece writes a space as this
RESERVED = re.compile(r"\[unused\d+\]")  # BERT's reserved tokens, which no text uses
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's byte fallback for unknown characters

INCOMPLETE = "\ufffd"  # stands for bytes that are part of a character


class Style(Enum):
    """How a vocabulary marks where a word begins."""

    spaces = auto()  # a piece contains the whitespace before it: byte-level BPE, SentencePiece
    continuations = auto()  # pieces inside a word are marked, whitespace is lost: WordPiece
    endings = auto()  # pieces that end a word are marked: the BPE of GPT-1 and CLIP
    words = auto()  # every piece is a word


@dataclass(frozen=True)
class Pieces:
    """Texts of a vocabulary."""

    texts: list[str]
    """[size]: text including its whitespace, without markers; empty for special tokens and ids without a token."""
    continues: npt.NDArray[np.bool_]
    """[size]: marked as a continuation of a word."""
    is_special: npt.NDArray[np.bool_]
    """[size]: tokens that never encode text, and ids without a token."""
    style: Style

    def begins_word(self) -> npt.NDArray[np.bool_] | None:
        """[size]: whether the token begins a word; None = this vocabulary does not mark it.

        A word begins at whitespace or at punctuation, so that `, he'll` is `,`, ` he`, `'ll`. Line ends and
        indentation belong to the word that follows: in `\\n`, `def` the line end begins the word. A Chinese character
        or a kana is a word. Words of WordPiece begin at every piece without `##`. A special token is a word.
        """
        if self.style is Style.endings:
            return None
        if self.style is not Style.spaces:
            return ~self.continues
        return np.fromiter(map(_begins_word, self.texts), np.bool_, len(self.texts)) | self.is_special


def unknown_token(spec: dict[str, Any]) -> str | None:
    """The token of a tokenizer.json that stands for text outside its vocabulary."""
    model = spec["model"]
    if model.get("unk_id") is not None:
        return str(model["vocab"][model["unk_id"]][0])
    return None if model.get("unk_token") is None else str(model["unk_token"])


def read_pieces(spec: dict[str, Any], size: int, roles: Collection[int]) -> Pieces:
    """The pieces of a tokenizer.json.

    Args:
        spec: its content.
        size: one above the largest id.
        roles: ids that are special even if the file does not mark them.
    """
    model = spec["model"]
    vocab = model["vocab"]
    by_text = vocab if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
    added = {entry["id"]: entry for entry in spec.get("added_tokens", [])}
    unknown = unknown_token(spec)
    style, byte_level = _style_of(spec, by_text)
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    texts, continues, is_special = [""] * size, np.zeros(size, np.bool_), np.ones(size, np.bool_)
    for text, i in by_text.items():
        entry = added.get(i)
        if i in roles or (entry and entry["special"] and text != unknown) or RESERVED.fullmatch(text):
            continue
        is_special[i] = False
        if style is Style.continuations and text.startswith(prefix):
            continues[i] = True
            text = text.removeprefix(prefix)
        texts[i] = _plain(text.removesuffix(suffix), byte_level and entry is None)
    for i, entry in added.items():
        if is_special[i] and i not in roles and not entry["special"]:
            texts[i], is_special[i] = entry["content"], False
    return Pieces(texts, continues, is_special, style)


def _style_of(spec: dict[str, Any], by_text: dict[str, int]) -> tuple[Style, bool]:
    """Style of the vocabulary, and whether its pieces use GPT-2's byte alphabet."""
    model = spec["model"]
    if model.get("type") == "WordPiece":
        return Style.continuations, False
    if model.get("end_of_word_suffix"):
        return Style.endings, False
    parts = _types(spec.get("pre_tokenizer")) | _types(spec.get("decoder"))
    if "ByteLevel" in parts:
        return Style.spaces, True
    if "Metaspace" in parts or any(text.startswith(SPACE_SIGN) for text in by_text):
        return Style.spaces, False
    return Style.words, False


def _types(part: Any) -> set[str]:
    """All `type` fields in a part of a tokenizer.json, however deep."""
    if isinstance(part, list):
        return set().union(*map(_types, part))
    if not isinstance(part, dict):
        return set()
    return {str(part.get("type"))}.union(*(_types(value) for value in part.values()))


def _begins_word(text: str) -> bool:
    first = text[:1]
    if not first or first == INCOMPLETE or unicodedata.category(first) == "Mn":
        return False
    return not first.isalnum() or is_ideograph(first)


def is_ideograph(letter: str) -> bool:
    """Whether a letter belongs to a script without spaces between words: Chinese and Japanese, but not Korean."""
    return unicodedata.east_asian_width(letter) in "WF" and not "가" <= letter <= "힣"


def _plain(text: str, byte_level: bool) -> str:
    if byte_level:
        return bytes(BYTE_OF_LETTER[letter] for letter in text if letter in BYTE_OF_LETTER).decode("utf-8", "replace")
    if byte := BYTE_PIECE.fullmatch(text):
        return bytes([int(byte[1], 16)]).decode("utf-8", "replace")
    return text.replace(SPACE_SIGN, " ")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_LETTER = _byte_alphabet()
