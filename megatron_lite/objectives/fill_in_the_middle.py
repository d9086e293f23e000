"""Fill in the middle: causal language modelling of rearranged documents (arXiv 2207.14255).

    document         prefix middle suffix [EOD]                               cut at two random places
    PSM              <PRE> prefix <SUF> suffix <MID> middle [EOD]
    SPM              <PRE> <SUF> suffix <MID> prefix middle [EOD]             the paper's variant for joint training
    tokens, labels   the window of s + 1 rearranged tokens, as in causal_lm

Token level: the cuts are uniform over the tokens of the document. Context level: the window is first cut into
documents, and the part of a document inside the window is rearranged, so that none of it is lost. A document that the
window truncates has no [EOD]; one that consists only of [EOD] is unchanged. The begin tokens of a document, such as a
beginning-of-text token, stay in front.

The added tokens take the place of the window's last tokens, which are dropped before anything is rearranged.
"""

from __future__ import annotations

import numpy as np

from megatron_lite.config.lengths import FIM_TOKENS
from megatron_lite.config.schema import DataConfig, ObjectiveConfig
from megatron_lite.data.special import Vocabulary
from megatron_lite.models.fields import Field
from megatron_lite.objectives.assembly import known
from megatron_lite.objectives.base import Example, Ids, Objective, Text
from megatron_lite.objectives.causal_lm import next_token_shape, next_token_weights, weightless_token
from megatron_lite.objectives.draws import Draws

CHOICES = 4  # random numbers per document: whether it is rearranged, in which order, and two cuts


class FillInTheMiddle(Objective):
    def __init__(self, objective: ObjectiveConfig, data: DataConfig, vocabulary: Vocabulary) -> None:
        self.inputs = (Field("tokens", data.seq_length),)
        self.label_length = data.seq_length
        self.shape = next_token_shape(data)
        self._weightless = weightless_token(data, vocabulary)
        special = vocabulary.special
        self._eod = known(special.eod)
        self._begin = np.array(special.begin, np.int64)
        added = (known(special.fim_prefix), known(special.fim_suffix), known(special.fim_middle))
        self._prefix, self._suffix, self._middle = (np.array([token], np.int64) for token in added)
        self._fraction = objective.fim_fraction
        self._spm_fraction = objective.fim_spm_fraction

    def example(self, text: Text, key: int) -> Example:
        assert len(text.tokens) == self.label_length + 1
        window = self._rearranged(text.tokens, Draws(key))
        tokens = window[:-1]
        return Example((tokens,), window[1:], next_token_weights(tokens, self._weightless))

    def _rearranged(self, window: Ids, draws: Draws) -> Ids:
        """Rearrange the documents of a window [s + 1], and drop its last tokens to make room for the added ones."""
        is_end = window == self._eod
        ends = (np.flatnonzero(is_end) + 1).tolist()
        if not is_end[-1]:
            ends.append(len(window))
        choices = draws.uniforms(CHOICES * len(ends)).reshape(-1, CHOICES).tolist()
        parts: list[Ids] = []
        begin, room = 0, len(window)
        for end, (moves, order, one, other) in zip(ends, choices, strict=True):
            is_moved = moves < self._fraction and not is_end[begin] and room > FIM_TOKENS
            kept = min(end - begin, room - FIM_TOKENS * is_moved)
            document = window[begin : begin + kept]
            if is_moved:
                parts += self._moved(document, one, other, order < self._spm_fraction)
            else:
                parts.append(document)
            begin = end
            room -= kept + FIM_TOKENS * is_moved
            if room == 0:
                break
        return np.concatenate(parts)

    def _moved(self, document: Ids, one: float, other: float, is_spm: bool) -> list[Ids]:
        """The pieces of a document in their new order, cut at two fractions of it; its begin tokens stay in front."""
        start = len(self._begin) if np.array_equal(document[: len(self._begin)], self._begin) else 0
        text = document[start:]
        content = len(text) - int(document[-1] == self._eod)
        first, second = sorted((int(one * (content + 1)), int(other * (content + 1))))
        return [document[:start], *self._pieces(text, first, second, content, is_spm)]

    def _pieces(self, document: Ids, first: int, second: int, content: int, is_spm: bool) -> list[Ids]:
        prefix, middle, suffix = document[:first], document[first:second], document[second:content]
        if is_spm:
            ahead = [self._prefix, self._suffix, suffix, self._middle, prefix]
        else:
            ahead = [self._prefix, prefix, self._suffix, suffix, self._middle]
        return [*ahead, middle, document[content:]]
