"""BART: restore a text whose sentences were shuffled and whose spans were masked (arXiv 1910.13461, section 2.2).

    text            a b c . d e f . [EOD] g h          n = s - 2 tokens
    tokens          [CLS] d [MASK] . a [MASK] c . [EOD] g h [SEP] [PAD] ...       s positions
    lengths         positions that are not padding
    labels          [CLS] a b c . d e f . [EOD] g h [SEP]                         s positions
    decoder_tokens  [SEP] [CLS] a b c . d e f . [EOD] g h                         BART's decoder begins with </s>

Sentences are shuffled within their document; the ends of documents keep their positions. Then spans of
Poisson-distributed lengths at random positions cover `infill_fraction` of the tokens (rounded); the span that would
exceed that number is shortened. Each span becomes one mask token; an empty span inserts a mask token between two other
tokens. Empty spans for which the input has no room are dropped (only small Poisson means have that many).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_lite.config.lengths import ENDS, covered_tokens
from megatron_lite.config.schema import DataConfig, ObjectiveConfig
from megatron_lite.data.special import Vocabulary
from megatron_lite.models.fields import Field
from megatron_lite.objectives.assembly import filled, known, shifted_right
from megatron_lite.objectives.base import Example, Ids, Objective, Text, WindowShape
from megatron_lite.objectives.draws import Draws, poisson_table

RANK_BITS = 40  # bits of a sentence's sort key for its random rank; the upper bits hold its document's number
LAST_RANK = np.uint64(2**RANK_BITS - 1)


class BartDenoising(Objective):
    def __init__(self, objective: ObjectiveConfig, data: DataConfig, vocabulary: Vocabulary) -> None:
        length = data.seq_length
        self.label_length = length
        self.inputs = (Field("tokens", length), Field("lengths"), Field("decoder_tokens", length))
        window = length - ENDS
        self._permutes = objective.permute_sentences
        self.shape = WindowShape(tokens=window, stride=window, sentences=self._permutes)
        self._covered = covered_tokens(length, objective.infill_fraction)
        self._mean_span = objective.infill_span_length
        self._span_table = poisson_table(self._mean_span)
        special = vocabulary.special
        self._cls, self._sep, self._pad = known(special.cls), known(special.sep), known(special.pad)
        self._mask, self._eod = known(special.mask), known(special.eod)

    def example(self, text: Text, key: int) -> Example:
        draws = Draws(key)
        length = self.label_length
        labels, predicted = filled(length, self._pad, self._cls, text.tokens, self._sep)
        assert predicted == length
        noised = text.tokens
        if self._permutes:
            assert text.sentence_starts is not None
            noised = shuffled_sentences(noised, text.sentence_starts, self._eod, draws)
        noised = self._infilled(noised, draws)
        tokens, used = filled(length, self._pad, self._cls, noised, self._sep)
        decoder_tokens = shifted_right(labels, self._sep)
        return Example((tokens, used, decoder_tokens), labels, np.ones(length, np.float32))

    def _infilled(self, tokens: Ids, draws: Draws) -> Ids:
        """Replace spans of the text by mask tokens; all arrangements of spans and other tokens are equally likely."""
        lengths = self._span_lengths(draws)
        count = len(tokens) - self._covered + len(lengths)  # tokens of the result
        is_span = draws.choose(len(lengths), count)
        widths = np.ones(count, np.int64)
        widths[is_span] = lengths[draws.order(len(lengths))]  # shuffled, so that the shortened span may be anywhere
        is_token = ~is_span
        out = np.full(count, self._mask, np.int64)
        out[is_token] = tokens[(np.cumsum(widths) - widths)[is_token]]
        return out

    def _span_lengths(self, draws: Draws) -> npt.NDArray[np.int64]:
        """Lengths of the spans [spans]; they sum to `_covered`."""
        lengths = np.zeros(0, np.int64)
        ends = lengths
        while len(ends) == 0 or ends[-1] < self._covered:
            more = 16 + int(1.5 * self._covered / self._mean_span)
            lengths = np.concatenate([lengths, draws.from_table(self._span_table, more)])
            ends = np.cumsum(lengths)
        spans = int(ends.searchsorted(self._covered)) + 1 if self._covered else 0
        lengths = lengths[:spans]
        if spans:
            lengths[-1] -= ends[spans - 1] - self._covered
        surplus = spans - self._covered  # more mask tokens than covered tokens would not fit
        return lengths if surplus <= 0 else _without_surplus(lengths, surplus)


def shuffled_sentences(tokens: Ids, sentence_starts: Ids, eod: int, draws: Draws) -> Ids:
    """Shuffle the sentences of each document; end-of-document tokens keep their positions."""
    is_end = tokens == eod
    begins = is_end.copy()
    begins[sentence_starts] = True
    starts = np.flatnonzero(begins)
    lengths = np.diff(np.append(starts, len(tokens)))
    document = (np.cumsum(is_end) - is_end)[starts]
    rank = draws.bits(len(starts)) >> np.uint64(64 - RANK_BITS)
    rank[is_end[starts]] = LAST_RANK
    order = np.argsort((document.astype(np.uint64) << np.uint64(RANK_BITS)) | rank, kind="stable")
    starts, lengths = starts[order], lengths[order]
    return tokens[np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(len(tokens))]


def _without_surplus(lengths: npt.NDArray[np.int64], surplus: int) -> npt.NDArray[np.int64]:
    """Drop the last `surplus` empty spans."""
    return np.delete(lengths, np.flatnonzero(lengths == 0)[-surplus:])
