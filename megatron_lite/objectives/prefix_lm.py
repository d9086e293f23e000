"""Prefix language modelling: bidirectional attention within a prefix, the rest is predicted (arXiv 1910.10683; U-PaLM,
arXiv 2210.11399).

    window          t0 t1 ... t(k-1) | tk ... ts        k uniform in 1 ... s
    tokens          t0 t1 ... t(s-1)
    prefix_lengths  k
    labels          t1 t2 ... ts                        loss weight 1 for the labels tk ... ts, else 0
"""

from __future__ import annotations

from megatron_lite.config.schema import DataConfig, ObjectiveConfig
from megatron_lite.data.special import Vocabulary
from megatron_lite.models.fields import Field
from megatron_lite.objectives.base import Example, Objective, Text
from megatron_lite.objectives.causal_lm import next_token_shape, next_token_weights, weightless_token
from megatron_lite.objectives.draws import Draws


class PrefixLM(Objective):
    def __init__(self, objective: ObjectiveConfig, data: DataConfig, vocabulary: Vocabulary) -> None:
        self.inputs = (Field("tokens", data.seq_length), Field("prefix_lengths"))
        self.label_length = data.seq_length
        self.shape = next_token_shape(data)
        self._weightless = weightless_token(data, vocabulary)

    def example(self, text: Text, key: int) -> Example:
        assert len(text.tokens) == self.label_length + 1
        prefix = 1 + Draws(key).below(self.label_length)
        tokens = text.tokens[:-1]
        weights = next_token_weights(tokens, self._weightless)
        weights[: prefix - 1] = 0
        return Example((tokens, prefix), text.tokens[1:], weights)
