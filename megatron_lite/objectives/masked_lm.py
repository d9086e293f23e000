"""Masked language modelling without sentence pairs (RoBERTa, arXiv 1907.11692: packed windows, dynamic masks).

    tokens   [CLS] t0 t1 [MASK] t3 ... t(s-3) [SEP]     packed documents with their end-of-document tokens
    labels   [CLS] t0 t1   t2   t3 ... t(s-3) [SEP]     loss weight 1 at the chosen positions, else 0

The masks are determined by the sample's key, so each epoch has new ones.
"""

from __future__ import annotations

import numpy as np

from megatron_lite.config.lengths import ENDS
from megatron_lite.config.schema import DataConfig, ObjectiveConfig
from megatron_lite.data.special import Vocabulary
from megatron_lite.models.fields import Field
from megatron_lite.objectives.assembly import filled, known
from megatron_lite.objectives.base import Example, Objective, Text, WindowShape
from megatron_lite.objectives.draws import Draws
from megatron_lite.objectives.masking import Masking


class MaskedLM(Objective):
    def __init__(self, objective: ObjectiveConfig, data: DataConfig, vocabulary: Vocabulary) -> None:
        self.inputs = (Field("tokens", data.seq_length),)
        self.label_length = data.seq_length
        self.shape = WindowShape(tokens=data.seq_length - ENDS, stride=data.seq_length - ENDS)
        self._cls = known(vocabulary.special.cls)
        self._sep = known(vocabulary.special.sep)
        self._mask = Masking(objective, vocabulary)

    def example(self, text: Text, key: int) -> Example:
        length = self.label_length
        labels, used = filled(length, self._sep, self._cls, text.tokens, self._sep)
        assert used == length
        tokens, chosen = self._mask(labels, Draws(key))
        return Example((tokens,), labels, chosen.astype(np.float32))
