"""Encode text to ids: names of special tokens stay text, and long documents are split only where no id changes.

Splitting lets a single document use all threads. It is correct only before a space between two letters, and only for
tokenizers that never look across such a space (`may_cut`). Any other document is encoded as a whole in one thread, at
the same total cost: all models of the `tokenizers` library are (nearly) linear in the length of a word.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from megatron_lite.data.tokenizer.pieces import unknown_token
from megatron_lite.errors import DataError, library_edge

if TYPE_CHECKING:
    pass

PIECE_CHARACTERS = 2**18  # longer documents are encoded in pieces of about this size
PROBE_TEXTS = 24
PROBE_CHARACTERS = 160
PROBE_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz",
    "ABC xyz 0123456789",
    " \n\t.,;:!?'\"()[]{}<>/\\_-=+*&%$#@",
    "äöüßéñçøœ ΑΒΓΔσς \u0430\u0431\u0432\u0433",
    "\u5929\u5730\u7384\u9ec4\u3002\uff0c \u3042\u3044\u30a2 \uac00\ub098",
    "e\u0301 a\u0308 \u200d\u00a0\u3000 \ufb01\u00bd\u2460 \U0001f642",
    "\u2581 \u0120\u010a ##",
)
_LETTER = r"[^\W\d_]"
_SAFE_CUT = re.compile(rf"(?<={_LETTER}) (?={_LETTER})")

# Splitting patterns that never put two letters with a space between them into one word.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
KNOWN_PATTERNS = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
        _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _SIGNS + _SPACES,  # GPT-4, Llama 3
        _CONTRACTIONS + _WORDS + r"\p{N}" + _SIGNS + _SPACES,  # Qwen 2
        "[0-9][0-9][0-9]",  # Falcon
        r"\p{N}{1,3}",
        r"\p{N}",
        r"[\r\n]",
        r"[0-9]",
    }
)
LOCAL_NORMALIZERS = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"})
LOCAL_SPLITTERS = frozenset({"Digits", "Punctuation"})  # look at single characters, and ignore spaces
WORD_SPLITTERS = frozenset({"Whitespace", "WhitespaceSplit", "BertPreTokenizer"})
WORD_MODELS = frozenset({"BPE", "WordPiece", "Unigram", "WordLevel"})


class Encoder:
    """Encodes text without ever producing special tokens.

    Args:
        spec: content of a tokenizer.json, as the library writes it.
        roles: id -> text of the tokens that no text may encode to.
        eod_id: the one among them that ends documents.
        name: data.tokenizer, for messages.
    """

    def __init__(self, spec: dict[str, Any], roles: dict[int, str], eod_id: int, name: str) -> None:
        from tokenizers import Tokenizer as Backend

        self._name = name
        self._roles = roles
        self._eod_id = eod_id
        what = f"data.tokenizer={name} cannot be configured to encode the names of special tokens as text"
        with library_edge(DataError, what, "name another tokenizer"):
            self._backend = Backend.from_str(json.dumps(text_only(spec, roles.values())))
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True  # special tokens inside a text are text
        self._is_role = np.zeros(1 + max(roles), np.bool_)
        self._is_role[list(roles)] = True
        self.may_cut = cuts_are_local(spec) and self._cuts_change_nothing()

    def encode(self, documents: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Concatenated ids of all documents [sum of lengths], and the length of each [documents].

        Raises:
            DataError: the library cannot encode a document, or a text encodes to a token of `roles`.
        """
        pieces: list[str] = []
        counts: list[int] = []
        for document in documents:
            parts = split_long(document, PIECE_CHARACTERS) if self.may_cut else [document]
            pieces += parts
            counts.append(len(parts))
        encoded = self._encode(pieces)
        piece_lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        tokens = np.fromiter(chain.from_iterable(encoded), np.int32, int(piece_lengths.sum()))
        self._refuse_roles(tokens, piece_lengths, pieces)
        bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        totals = np.concatenate([[0], np.cumsum(piece_lengths)])
        return tokens, np.diff(totals[bounds])

    def _encode(self, texts: list[str]) -> list[list[int]]:
        try:
            return self._encode_together(texts)
        except DataError:
            for text in texts if len(texts) > 1 else ():  # one after another, so that the error names the right one
                self._encode_together([text])
            raise

    def _encode_together(self, texts: list[str]) -> list[list[int]]:
        longest = max(texts, key=len, default="")
        with library_edge(
            DataError,
            f"data.tokenizer={self._name} cannot encode a text of up to {len(longest):,} characters, "
            f"{longest[:40]!r}...",
            "split or remove the document, or name another tokenizer",
        ):
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _refuse_roles(
        self, tokens: npt.NDArray[np.int32], piece_lengths: npt.NDArray[np.int64], pieces: list[str]
    ) -> None:
        found = np.flatnonzero(self._is_role.take(tokens, mode="clip") & (tokens < len(self._is_role)))
        if len(found) == 0:
            return
        text = pieces[int(np.searchsorted(np.cumsum(piece_lengths), found[0], side="right"))]
        token = int(tokens[found[0]])
        raise DataError(
            f"the text {text[:40]!r}... encodes to the {'end-of-document' if token == self._eod_id else 'special'} "
            f"token {self._roles[token]!r} itself; name another data.tokenizer, or other special tokens in its "
            "tokenizer_config.json"
        )

    def _cuts_change_nothing(self) -> bool:
        """Whether random texts get the same ids as a whole and in pieces."""
        generator = random.Random(0)
        texts = [_probe_text(generator) for _ in range(PROBE_TEXTS)]
        parts = [split_at(text, [match.start() for match in _SAFE_CUT.finditer(text)]) for text in texts]
        try:
            whole = self._encode(texts)
            return whole == [list(chain.from_iterable(self._encode(pieces))) for pieces in parts]
        except DataError:  # a vocabulary without a token for unknown characters
            return False


def _probe_text(generator: random.Random) -> str:
    words: list[str] = []
    while sum(len(word) for word in words) < PROBE_CHARACTERS:
        alphabet = generator.choice(PROBE_ALPHABETS)
        words.append("".join(generator.choices(alphabet, k=generator.randint(1, 9))))
        words.append(generator.choice((" ", " ", " ", "\n", "")))
    return "".join(words)


def text_only(spec: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A tokenizer.json that never encodes text to a special token, with unchanged ids for all other text.

    Some vocabularies also contain the name of a special token as an ordinary piece (`</s>` in Unigram and
    SentencePiece), and would find it in a text. Here such pieces are renamed to strings that no text contains. A name
    of a single character is kept, because ordinary text uses it; `Encoder` then refuses the text.
    """
    special = dict.fromkeys([*names, *(entry["content"] for entry in spec["added_tokens"] if entry.get("special"))])
    hidden = {name: f"\U0010fffe{i}\U0010ffff" for i, name in enumerate(special) if len(name) > 1}
    model = spec["model"]
    hidden.pop(unknown_token(spec) or "", None)
    added = [{**entry, "content": hidden.get(entry["content"], entry["content"])} for entry in spec["added_tokens"]]
    changed = {"added_tokens": added, "model": _renamed(model, hidden), "post_processor": None}
    return {**spec, **changed, "truncation": None, "padding": None}


def _renamed(model: dict[str, Any], hidden: dict[str, str]) -> dict[str, Any]:
    vocab = model["vocab"]
    if isinstance(vocab, list):
        return {**model, "vocab": [[hidden.get(piece, piece), score] for piece, score in vocab]}
    found = hidden.keys() & vocab.keys()
    if not found:
        return model
    renamed = {**model, "vocab": {hidden.get(piece, piece): i for piece, i in vocab.items()}}
    if "merges" in model:
        renamed["merges"] = [merge for merge in model["merges"] if not found & _pieces_of(merge)]
    return renamed


def _pieces_of(merge: str | list[str]) -> set[str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return {left, right, left + right}


def cuts_are_local(spec: dict[str, Any]) -> bool:
    """Whether no part of a tokenizer.json looks across a space between two letters.

    False for everything that is not known to be safe: normalizers that look at the beginning of a text, custom
    patterns, tokenizers that do not split texts into words.
    """
    model = spec["model"]
    if model.get("type") not in WORD_MODELS or model.get("dropout"):
        return False
    if any(_reaches_over_spaces(entry) for entry in spec["added_tokens"]):
        return False
    if not all(map(_is_local_normalizer, _parts(spec.get("normalizer"), "normalizers"))):
        return False
    splitters = _parts(spec.get("pre_tokenizer"), "pretokenizers")
    return all(_splits(part) is not None for part in splitters) and any(_splits(part) for part in splitters)


def _reaches_over_spaces(entry: dict[str, Any]) -> bool:
    """Whether an added token that is matched inside text contains a space, or absorbs the space after it."""
    return not entry.get("special") and (entry.get("rstrip", False) or any(map(str.isspace, entry["content"])))


def _parts(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return list(chain.from_iterable(_parts(inner, key) for inner in part[key]))
    return [part]


def _is_local_normalizer(part: dict[str, Any]) -> bool:
    pattern = part.get("pattern")
    if part["type"] == "Replace" and isinstance(pattern, dict):
        text = pattern.get("String")
        return isinstance(text, str) and not any(map(str.isspace, text))
    return part["type"] in LOCAL_NORMALIZERS


def _splits(part: dict[str, Any]) -> bool | None:
    """Whether a pre-tokenizer splits at a space between two letters; None = it may not be safe to cut there."""
    kind = part["type"]
    if kind == "ByteLevel":
        return bool(part.get("use_regex", True))
    if kind == "Metaspace":
        return True if part.get("split", True) else None
    if kind == "Split":
        known = isinstance(part["pattern"], dict) and part["pattern"].get("Regex") in KNOWN_PATTERNS
        is_plain = part.get("behavior") in ("Isolated", "Removed") and (not part.get("invert") or _is_words(part))
        return _is_words(part) if known and is_plain else None
    if kind in LOCAL_SPLITTERS:
        return False
    return True if kind in WORD_SPLITTERS else None


def _is_words(part: dict[str, Any]) -> bool:
    return r"\s+" in part["pattern"]["Regex"]


def split_long(text: str, size: int) -> list[str]:
    """Cut a text before single spaces between letters, about every `size` characters."""
    cuts: list[int] = []
    begin = 0
    while len(text) - begin > size:
        gap = _SAFE_CUT.search(text, begin + size // 2)
        if gap is None:
            break
        begin = gap.start()
        cuts.append(begin)
    return split_at(text, cuts)


def split_at(text: str, cuts: Sequence[int]) -> list[str]:
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
