"""UL2: a mixture of seven denoisers (arXiv 2205.05131, table 1), distinguished by a mode token.

    tokens          [MODE] a b <X> d e <Y> [EOD] [PAD] ...      s positions
    lengths         positions that are not padding
    labels          <X> c <Y> f g [EOD] [PAD] ...               d positions, loss weight 0 for padding
    decoder_tokens  [PAD] <X> c <Y> f g [PAD] ...

R-denoisers ([NLU]) remove short spans at a low rate, X-denoisers ([NLG]) remove long or many spans, exactly as
`span_corruption` does. The S-denoiser ([S2S]) removes one span from a random position to the end, so it is a prefix
language model. It uses a sentinel like the others, as in prompts of the published UL2 model.

Each denoiser uses the first n tokens of the window, as many as fit both stacks. Each has its own n and lengths
(`config.lengths.ul2_lengths`); the rest is padding. The window is the largest n.

Each denoiser with a positive weight and mean span 3 or 8 must remove at least one whole span, and no two may become the
same task; otherwise the configuration is refused. Spans of 64 are shortened to what fits. The reference is the paper's
512 tokens: at 128, the denoiser (64, 0.15) removes one span of 22.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import numpy as np

from megatron_lite.config.lengths import (
    Denoiser,
    denoisers,
    span_counts,
    suffix_bounds,
    ul2_decoder_length,
    ul2_lengths,
)
from megatron_lite.config.schema import DataConfig, ObjectiveConfig
from megatron_lite.data.special import Vocabulary
from megatron_lite.models.fields import Field
from megatron_lite.objectives.assembly import filled, known, leading, shifted_right
from megatron_lite.objectives.base import Example, Ids, Objective, Text, WindowShape
from megatron_lite.objectives.draws import Draws
from megatron_lite.objectives.span_corruption import Lengths, sentinels, take_out


class UL2(Objective):
    def __init__(self, objective: ObjectiveConfig, data: DataConfig, vocabulary: Vocabulary) -> None:
        decoder = ul2_decoder_length(objective, data.seq_length)
        self._length = data.seq_length
        self.label_length = decoder
        self.inputs = (Field("tokens", data.seq_length), Field("lengths"), Field("decoder_tokens", decoder))
        self._windows = {place: lengths.window for place, lengths in ul2_lengths(objective, data.seq_length).items()}
        largest = max(self._windows.values())
        self.shape = WindowShape(tokens=largest, stride=largest)
        self._cumulative = list(accumulate(objective.ul2_weights))
        self._denoisers = denoisers(objective)
        self._sentinels = sentinels(objective, data, vocabulary)
        special = vocabulary.special
        self._pad, self._eod = known(special.pad), known(special.eod)
        modes = {"r": special.mode_r, "s": special.mode_s, "x": special.mode_x}
        self._begin = [[known(modes[d.mode])] if objective.ul2_mode_tokens else [] for d in self._denoisers]

    def example(self, text: Text, key: int) -> Example:
        draws = Draws(key)
        place = bisect_right(self._cumulative, draws.uniform() * self._cumulative[-1])
        window = text.tokens[: self._windows[place]]
        kept, taken = self._pieces(self._denoisers[place], len(window), draws)
        rest, spans = take_out(window, kept, taken, self._sentinels)
        tokens, used = filled(self._length, self._pad, *self._begin[place], rest, self._eod)
        labels, predicted = filled(self.label_length, self._pad, spans, self._eod)
        decoder_tokens = shifted_right(labels, self._pad)
        decoder_tokens[predicted:] = self._pad
        return Example((tokens, used, decoder_tokens), labels, leading(predicted, self.label_length))

    def _pieces(self, denoiser: Denoiser, window: int, draws: Draws) -> tuple[Lengths, Lengths]:
        """Lengths of the kept and of the removed pieces."""
        if denoiser.mode == "s":
            shortest, longest = suffix_bounds(window, denoiser.noise_density)
            suffix = shortest + draws.below(longest - shortest + 1)
            return _one(window - suffix), _one(suffix)
        noise, spans = span_counts(window, denoiser.noise_density, denoiser.mean_span_length)
        taken = draws.segments(noise, spans)
        return draws.segments(window - noise, spans), taken


def _one(length: int) -> Ids:
    return np.array([length], np.int64)
