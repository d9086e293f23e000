"""The tokens that objectives put around and into a text, by their role."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class SpecialTokens:
    """Ids by role; None or empty = the vocabulary has no such token."""

    eod: int | None = None
    """Ends every document in the shards."""
    cls: int | None = None
    """Begins an input of BERT, RoBERTa and BART."""
    sep: int | None = None
    """Ends a part of such an input."""
    mask: int | None = None
    pad: int | None = None
    """Fills up inputs, and begins the decoder's input of T5."""
    sentinels: tuple[int, ...] = ()
    """Stand for the spans that T5 and UL2 take out, in this order."""
    mode_r: int | None = None
    """[NLU], of UL2's R-denoisers: short spans, low rate."""
    mode_s: int | None = None
    """[S2S], of its S-denoiser: a prefix language model."""
    mode_x: int | None = None
    """[NLG], of its X-denoisers: long spans or high rate."""
    fim_prefix: int | None = None
    fim_suffix: int | None = None
    fim_middle: int | None = None


@dataclass(frozen=True)
class Vocabulary:
    """What objectives know of the tokens."""

    size: int
    special: SpecialTokens = field(default_factory=SpecialTokens)
    is_special: npt.NDArray[np.bool_] | None = None
    """[size]: tokens that no text is made of. None = unknown: shards without their tokenizer."""
    begins_word: npt.NDArray[np.bool_] | None = None
    """[size]: tokens that begin a word. None = unknown."""
