"""Causal language modelling: predict every token from those before it (GPT, arXiv 2005.14165).

window   t0 t1 t2 ... ts          s + 1 tokens, the next one starts at ts
tokens   t0 t1 ... t(s-1)
labels   t1 t2 ... ts
"""

from __future__ import annotations

import numpy as np

from megatron_lite.config.schema import DataConfig, ObjectiveConfig
from megatron_lite.data.special import Vocabulary
from megatron_lite.models.fields import Field
from megatron_lite.objectives.assembly import Weights, known
from megatron_lite.objectives.base import Example, Ids, Objective, Text, WindowShape


class CausalLM(Objective):
    def __init__(self, objective: ObjectiveConfig, data: DataConfig, vocabulary: Vocabulary) -> None:
        self.inputs = (Field("tokens", data.seq_length),)
        self.label_length = data.seq_length
        self.shape = next_token_shape(data)
        self._weightless = weightless_token(data, vocabulary)

    def example(self, text: Text, key: int) -> Example:
        assert len(text.tokens) == self.label_length + 1
        tokens = text.tokens[:-1]
        return Example((tokens,), text.tokens[1:], next_token_weights(tokens, self._weightless))


def next_token_shape(data: DataConfig) -> WindowShape:
    """Neighbouring windows share a token, so that each token of the stream is predicted exactly once."""
    return WindowShape(tokens=data.seq_length + 1, stride=data.seq_length)


def weightless_token(data: DataConfig, vocabulary: Vocabulary) -> int | None:
    """The input token whose prediction has no loss: after an end of document comes the start of an unrelated one."""
    return known(vocabulary.special.eod) if data.mask_loss_after_eod else None


def next_token_weights(tokens: Ids, weightless: int | None) -> Weights:
    """Loss weights [s]: 0 where the input is the token `weightless`, else 1."""
    if weightless is None:
        return np.ones(len(tokens), np.float32)
    return (tokens != weightless).astype(np.float32)
