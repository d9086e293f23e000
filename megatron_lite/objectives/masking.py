"""Choose and mask the tokens that a masked language model predicts (BERT, arXiv 1810.04805, section 3.1)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_lite.config.schema import ObjectiveConfig
from megatron_lite.data.special import Vocabulary
from megatron_lite.errors import ConfigError
from megatron_lite.objectives.assembly import known
from megatron_lite.objectives.base import Ids
from megatron_lite.objectives.draws import Draws

Flags = npt.NDArray[np.bool_]


class Masking:
    """Masks a fixed fraction of the ordinary tokens of an input; special tokens are never masked.

    With the default settings, 80 % of the chosen tokens become the mask token, 10 % become a random ordinary token and
    10 % stay unchanged, independently of each other.
    """

    def __init__(self, objective: ObjectiveConfig, vocabulary: Vocabulary) -> None:
        assert vocabulary.is_special is not None
        self._is_special = vocabulary.is_special
        self._ordinary = np.flatnonzero(~vocabulary.is_special)
        self._begins_word = vocabulary.begins_word if objective.whole_word else None
        if objective.whole_word and vocabulary.begins_word is None:
            raise ConfigError(
                "objective.whole_word=true needs a tokenizer that marks which tokens begin a word; name one in "
                "data.tokenizer, or set objective.whole_word=false"
            )
        self._mask = known(vocabulary.special.mask)
        self._fraction = objective.masked_fraction
        self._mask_below = objective.mask_token_fraction
        self._random_below = objective.mask_token_fraction + objective.random_token_fraction

    def __call__(self, tokens: Ids, draws: Draws) -> tuple[Ids, Flags]:
        """
        Args:
            tokens: [any length]
        Returns:
            the tokens after masking, and flags of those to predict
        """
        chosen = self._choose(tokens, draws)
        places = np.flatnonzero(chosen)
        fates = draws.uniforms(len(places))
        replaced = np.where(fates < self._mask_below, self._mask, tokens[places])
        is_random = (fates >= self._mask_below) & (fates < self._random_below)
        bounds = np.full(int(is_random.sum()), len(self._ordinary))
        replaced[is_random] = self._ordinary[draws.integers(bounds)]
        hidden = tokens.copy()
        hidden[places] = replaced
        return hidden, chosen

    def _choose(self, tokens: Ids, draws: Draws) -> Flags:
        """Flags [len(tokens)] of masked_fraction of the ordinary tokens (rounded, at least one if there are any)."""
        maskable = ~self._is_special[tokens]
        places = np.flatnonzero(maskable)
        chosen = np.zeros(len(tokens), np.bool_)
        if len(places) == 0:
            return chosen
        count = max(1, round(self._fraction * len(places)))
        if self._begins_word is None:
            chosen[places] = draws.choose(min(count, len(places)), len(places))
            return chosen
        begins = self._begins_word[tokens[places]]
        begins[1:] |= np.diff(places) > 1  # a special token ends a word
        begins[0] = True
        starts = np.flatnonzero(begins)
        lengths = np.diff(np.append(starts, len(places)))
        taken = np.zeros(len(starts), np.bool_)
        taken[_whole_words(lengths, draws.order(len(starts)), count)] = True
        chosen[places[np.repeat(taken, lengths)]] = True
        return chosen


def _whole_words(lengths: npt.NDArray[np.int64], order: npt.NDArray[np.int64], count: int) -> list[int]:
    """Take words in this order, skipping those that would exceed `count` tokens; the first is always taken."""
    taken = []
    total = 0
    for word, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if total and total + length > count:
            continue
        taken.append(word)
        total += length
        if total >= count:
            break
    return taken
