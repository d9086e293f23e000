"""Find sentence boundaries in token ids, and the file beside a pair of shards that stores them.

The rule, for languages with spaces and for Chinese and Japanese:
    - A document begins a sentence.
    - A sentence begins after `.`, `!`, `?`, `…` and closing quotes or brackets, then whitespace, at a capital letter,
      a digit, an opening quote or bracket, or a letter of a script without case. After the Chinese full stop,
      exclamation mark and question mark no whitespace is needed.
    - A blank line always ends a sentence: headings, list entries, paragraphs and blocks of source code.
    - A sentence of more than LONG_SENTENCE tokens is cut at line ends, about every LONG_SENTENCE tokens (source code,
      tables and verse). Without line ends it stays whole.
    - Whitespace and the end-of-document token belong to the preceding sentence, except a space that is part of the
      next word's token. A token that crosses a boundary, such as `.` with the line ends after it, or a Chinese full
      stop with an opening quote, belongs to the sentence in which it begins.

Limits. A period after one letter or one of ABBREVIATIONS (`J.`, `e.g.`, `Dr.` if it is one token) ends no sentence;
longer lists of abbreviations depend on the language, so `Inc. The` does end one. In a vocabulary without capitals,
lower-case letters begin sentences. WordPiece drops whitespace, so only punctuation decides: blank lines and line ends
are invisible, a digit begins no sentence (`3.14`), and a quote stays with the preceding sentence. A final punctuation
mark that is split into several byte tokens is missed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_lite.data.shards.arrays import ArrayWriter, map_array
from megatron_lite.data.tokenizer.pieces import INCOMPLETE, Pieces, Style

LONG_SENTENCE = 64
FINAL_SIGNS = ".!?…؟।"
WIDE_FINAL_SIGNS = "。！？｡"  # noqa: RUF001
CLOSING_SIGNS = "\"'”’»)]}」』】）》"  # noqa: RUF001
OPENING_SIGNS = "\"'“‘«„([{`*#<•¿¡「『【（《"  # noqa: RUF001
ABBREVIATIONS = frozenset(["mr", "mrs", "ms", "dr", "prof", "st", "vs", "cf", "fig", "e.g", "i.e"])

# The properties of a token that the rule needs, as 16-bit flags in a table by token id.
VISIBLE, FINAL, WIDE_FINAL, CLOSES, OPENS, SPACE_BEFORE, SPACE_AFTER, SHORT, LETTER, POINT = (1 << i for i in range(10))
BREAKS_BEFORE, BREAKS_AFTER = 10, 12  # bit offsets of two-bit counts: line ends before and after the visible characters
MOST_BREAKS = 3

Kinds = npt.NDArray[np.uint16]
Flags = npt.NDArray[np.bool_]


def sentence_kinds(pieces: Pieces) -> Kinds:
    """The flags of each token of a vocabulary [size]."""
    cased = any(letter.isupper() for text in pieces.texts for letter in text)
    keeps_spaces = pieces.style is Style.spaces
    kinds = [
        _kind(text, cased, _spaced(text, bool(inside), keeps_spaces), keeps_spaces)
        for text, inside in zip(pieces.texts, pieces.continues, strict=True)
    ]
    return np.array(kinds, np.uint16)


def _spaced(text: str, inside_word: bool, keeps_spaces: bool) -> bool:
    """Whether there is whitespace before a piece, or may have been if the vocabulary drops it."""
    if keeps_spaces:
        return text[:1].isspace()
    return not inside_word and (text[:1].isalnum() or text[:1] in "([{")


def _kind(text: str, cased: bool, spaced: bool, keeps_spaces: bool) -> int:
    visible = text.strip()
    if not visible:
        return min(text.count("\n"), MOST_BREAKS) << BREAKS_BEFORE
    before, after = text[: text.index(visible[0])], text[len(text.rstrip()) :]
    core = visible.rstrip(CLOSING_SIGNS)
    word = core.rstrip(".").casefold()
    short = word in ABBREVIATIONS or (len(word) == 1 and word.isalpha() and (spaced or visible[0].isupper()))
    ends = not short and core[-1:] in tuple(FINAL_SIGNS)
    first = visible[0]
    opens = _opens(first, cased) and (keeps_spaces or not first.isdigit())
    return (
        VISIBLE
        | FINAL * ends
        | WIDE_FINAL * (visible.rstrip(CLOSING_SIGNS + OPENING_SIGNS)[-1:] in tuple(WIDE_FINAL_SIGNS))
        | CLOSES * (not core and not spaced)
        | OPENS * opens
        | SPACE_BEFORE * spaced
        | SPACE_AFTER * bool(after)
        | SHORT * (short and core[-1:] != ".")
        | LETTER * (len(visible) == 1 and visible.isalpha())
        | POINT * (visible == ".")
        | min(before.count("\n"), MOST_BREAKS) << BREAKS_BEFORE
        | min(after.count("\n"), MOST_BREAKS) << BREAKS_AFTER
    )


def _opens(letter: str, cased: bool) -> bool:
    if letter.islower():
        return not cased
    return letter.isalnum() or letter in OPENING_SIGNS or letter == INCOMPLETE


def sentence_starts(tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int64], kinds: Kinds) -> Flags:
    """Which tokens begin a sentence, by the rule of this module.

    Args:
        tokens: concatenated documents [n].
        lengths: number of tokens of each document [documents].
        kinds: from `sentence_kinds`; larger ids are treated as its last.
    Returns:
        flags [n]; True for the first token of every document.
    """
    starts = np.zeros(len(tokens), np.bool_)
    firsts = (np.cumsum(lengths) - lengths)[lengths > 0]
    starts[firsts] = True
    kind = kinds.take(tokens, mode="clip")
    shown = np.flatnonzero((kind & VISIBLE).astype(np.bool_))
    if len(shown) < 2:
        return starts
    opens, begins_line = _judge(kind, shown)
    first_shown = np.searchsorted(shown, firsts)
    first_shown = first_shown[first_shown < len(shown)]
    opens[first_shown] = begins_line[first_shown] = False  # that sentence began with its document
    starts[shown[opens]] = True
    _cut_long(starts, shown[begins_line])
    return starts


def _judge(kind: Kinds, shown: npt.NDArray[np.intp]) -> tuple[Flags, Flags]:
    """For each visible token [shown]: whether a sentence begins at it, and whether a line does."""
    here = kind[shown]
    last, this = here[:-1], here[1:]
    gap = np.diff(shown) > 1
    spaced = gap | (this & SPACE_BEFORE != 0) | (last & SPACE_AFTER != 0)
    ended = here & (FINAL | WIDE_FINAL)
    point = (this & POINT != 0) & ~spaced
    short = last & SHORT != 0
    short[2:] |= (last[2:] & LETTER != 0) & point[:-2]  # the g in e.g.
    ended[1:][point & short] = 0
    closes = (this & CLOSES != 0) & ~spaced
    for _ in range(2):  # up to two closing signs, such as a quote and a bracket
        ended[1:] |= ended[:-1] * closes
    breaks = _line_breaks(kind, shown, here)
    done = (ended[:-1] & WIDE_FINAL != 0) | ((ended[:-1] & FINAL != 0) & spaced)
    opens = (done & (this & OPENS != 0)) | (breaks > 1)
    return np.concatenate([[False], opens]), np.concatenate([[False], breaks > 0])


def _line_breaks(kind: Kinds, shown: npt.NDArray[np.intp], here: Kinds) -> npt.NDArray[np.int32]:
    """Line ends between each visible token and the next [shown - 1]."""
    every = ((kind >> BREAKS_BEFORE) & 3) + ((kind >> BREAKS_AFTER) & 3)
    up_to = np.cumsum(every, dtype=np.int32)[shown] - (
        (here >> BREAKS_AFTER) & 3
    )  # up to the last visible character of each
    return np.diff(up_to)


def _cut_long(starts: Flags, lines: npt.NDArray[np.intp]) -> None:
    """Split each long sentence at the first line start in every further LONG_SENTENCE tokens."""
    begins = np.flatnonzero(starts)
    long = np.diff(begins, append=len(starts)) > LONG_SENTENCE
    if not long.any() or len(lines) == 0:
        return
    owner = np.searchsorted(begins, lines, side="right") - 1
    lines, owner = lines[long[owner]], owner[long[owner]]
    stretch = (lines - begins[owner]) // LONG_SENTENCE
    fresh = (np.diff(owner, prepend=-1) != 0) | (np.diff(stretch, prepend=-1) != 0)
    starts[lines[fresh & (stretch > 0)]] = True


SENTENCE_DTYPE = np.dtype("<i8")


def sentences_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".sentences")


class SentenceWriter:
    """Writes the positions of all sentence starts of a pair of shards, int64, in tokens from the start of the .bin."""

    def __init__(self, path: Path, kinds: Kinds | None) -> None:
        self._kinds = kinds
        self._tokens = 0
        self._array = ArrayWriter(path, SENTENCE_DTYPE)

    @property
    def path(self) -> Path:
        return self._array.path

    def add(self, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> None:
        """Append documents: their concatenated tokens [sum(lengths)], and the length of each [documents]."""
        assert self._kinds is not None
        self.add_places(np.flatnonzero(sentence_starts(tokens, lengths, self._kinds)) + self._tokens)
        self._tokens += len(tokens)

    def add_places(self, places: npt.NDArray[np.int64]) -> None:
        """Append known positions, in ascending order [any number]."""
        self._array.add(places)

    def finish(self) -> dict[str, Any]:
        """Close the file and return its `Shard` fields."""
        return self._array.finish("sentences")


def read_sentences(path: Path, size: int) -> npt.NDArray[np.int64]:
    """Memory-map what `SentenceWriter` wrote: ascending positions in the .bin, in tokens.

    Raises:
        DataError: the file is missing, or does not have `size` bytes.
    """
    return map_array(path, SENTENCE_DTYPE, size)
