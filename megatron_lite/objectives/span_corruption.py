"""Span corruption: spans of the text are removed and predicted one after another (T5, arXiv 1910.10683).

    window          thank you for inviting me to your party last week       n tokens
    tokens          thank you <X> me to your party <Y> week [EOD]           exactly s
    labels          <X> for inviting <Y> last [EOD]                         exactly d
    decoder_tokens  [PAD] <X> for inviting <Y> last

n is chosen so that neither stack is padded (`config.lengths`). The lengths of the spans and of the pieces between them
are random divisions as in T5's `random_spans_noise_mask`; the text begins with a kept piece and ends with a span. The
sentinels <X>, <Y>, ... are used in the order of `SpecialTokens.sentinels`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_lite.config.lengths import sentinels_needed, span_corruption_lengths, span_counts
from megatron_lite.config.schema import DataConfig, ObjectiveConfig
from megatron_lite.data.special import Vocabulary
from megatron_lite.models.fields import Field
from megatron_lite.objectives.assembly import filled, known, shifted_right
from megatron_lite.objectives.base import Example, Ids, Objective, Text, WindowShape
from megatron_lite.objectives.draws import Draws

Lengths = npt.NDArray[np.int64]


class SpanCorruption(Objective):
    def __init__(self, objective: ObjectiveConfig, data: DataConfig, vocabulary: Vocabulary) -> None:
        density, mean_span = objective.noise_density, objective.mean_span_length
        window, decoder, self._spans = span_corruption_lengths(data.seq_length, density, mean_span)
        self._noise = span_counts(window, density, mean_span)[0]
        self._length = data.seq_length
        self.inputs = (Field("tokens", data.seq_length), Field("decoder_tokens", decoder))
        self.label_length = decoder
        self.shape = WindowShape(tokens=window, stride=window)
        self._sentinels = sentinels(objective, data, vocabulary)
        self._pad = known(vocabulary.special.pad)
        self._eod = known(vocabulary.special.eod)

    def example(self, text: Text, key: int) -> Example:
        draws = Draws(key)
        taken = draws.segments(self._noise, self._spans)
        kept = draws.segments(len(text.tokens) - self._noise, self._spans)
        rest, spans = take_out(text.tokens, kept, taken, self._sentinels)
        tokens, used = filled(self._length, self._pad, rest, self._eod)
        labels, predicted = filled(self.label_length, self._pad, spans, self._eod)
        assert used == self._length
        assert predicted == self.label_length
        return Example((tokens, shifted_right(labels, self._pad)), labels, np.ones(predicted, np.float32))


def sentinels(objective: ObjectiveConfig, data: DataConfig, vocabulary: Vocabulary) -> Ids:
    """The sentinels of the vocabulary, in order; data preparation has checked that there are enough."""
    found = vocabulary.special.sentinels
    assert len(found) >= sentinels_needed(objective, data.seq_length)
    return np.array(found, np.int64)


def take_out(tokens: Ids, kept: Lengths, taken: Lengths, sentinels: Ids) -> tuple[Ids, Ids]:
    """Split a text into kept and removed pieces, with a sentinel in the place of each missing piece.

    Args:
        tokens: [n]
        kept, taken: [k] positive lengths of alternating pieces, starting with a kept one; they sum to n.
        sentinels: [at least k]
    Returns:
        the rest: kept piece, sentinel, kept piece, sentinel, ...
        the spans: sentinel, removed piece, sentinel, removed piece, ...
    """
    count = len(kept)
    lengths = np.empty(2 * count, np.int64)
    lengths[0::2] = kept
    lengths[1::2] = taken
    starts = np.cumsum(lengths) - lengths
    is_taken = np.repeat(np.arange(2 * count) % 2 == 1, lengths)
    rest = _with_sentinels(tokens, ~is_taken, starts[1::2], sentinels[:count])
    return rest, _with_sentinels(tokens, is_taken, starts[0::2], sentinels[:count])


def _with_sentinels(tokens: Ids, stays: npt.NDArray[np.bool_], starts: Lengths, sentinels: Ids) -> Ids:
    """The tokens that stay, with a sentinel in place of each other piece; modifies `stays`."""
    marked = tokens.copy()
    marked[starts] = sentinels
    stays[starts] = True
    return marked[stays]
