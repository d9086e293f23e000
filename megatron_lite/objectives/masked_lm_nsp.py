"""Masked language modelling on sentence pairs, with next-sentence prediction (BERT, arXiv 1810.04805).

    tokens    [CLS] a0 [MASK] a2 ... [SEP] b0 b1 ... [SEP] [PAD] ...    s positions
    segments    0   0    0    0        0   1  1        1     0   ...
    lengths   3 + number of tokens of both parts
    labels    [CLS] a0   a1   a2 ... [SEP] b0 b1 ... [SEP] [PAD] ...    loss weight 1 at the chosen positions, else 0

The label of the whole sample is 0 if the second part follows the first, and 1 if it is a random one, as in BERT's own
code and in transformers, so that their weights can be used here.
"""

from __future__ import annotations

import numpy as np

from megatron_lite.config.lengths import PAIR_ENDS
from megatron_lite.config.schema import DataConfig, ObjectiveConfig
from megatron_lite.data.special import Vocabulary
from megatron_lite.models.fields import Field
from megatron_lite.objectives.assembly import filled, known
from megatron_lite.objectives.base import Example, Objective, PairShape, SentencePair
from megatron_lite.objectives.draws import Draws
from megatron_lite.objectives.masking import Masking


class MaskedLMNextSentence(Objective):
    has_sequence_label = True

    def __init__(self, objective: ObjectiveConfig, data: DataConfig, vocabulary: Vocabulary) -> None:
        length = data.seq_length
        self.inputs = (Field("tokens", length), Field("segments", length), Field("lengths"))
        self.label_length = length
        self.shape = PairShape(length - PAIR_ENDS, objective.next_fraction, objective.short_fraction)
        self._cls = known(vocabulary.special.cls)
        self._sep = known(vocabulary.special.sep)
        self._pad = known(vocabulary.special.pad)
        self._mask = Masking(objective, vocabulary)

    def example(self, text: SentencePair, key: int) -> Example:
        length = self.label_length
        parts = (self._cls, text.first, self._sep, text.second, self._sep)
        labels, used = filled(length, self._pad, *parts)
        segments = np.zeros(length, np.int64)
        segments[len(text.first) + 2 : used] = 1
        hidden, is_chosen = self._mask(labels[:used], Draws(key))
        tokens, _ = filled(length, self._pad, hidden)
        weights = np.zeros(length, np.float32)
        weights[:used] = is_chosen
        return Example((tokens, segments, used), labels, weights, int(not text.is_next))
