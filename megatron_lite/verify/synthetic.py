"""Synthetic samples for the equivalence check: random text that depends only on (seed, index)."""

from __future__ import annotations

from itertools import count

import numpy as np
import numpy.typing as npt
import torch

from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.data.sampler import stream_key
from megatron_lite.data.samples.batch import MicroBatch, stack
from megatron_lite.data.special import SpecialTokens, Vocabulary
from megatron_lite.errors import ConfigError
from megatron_lite.objectives.base import Example, Objective, SentencePair, Text, WindowShape

SYNTHETIC_ROLES = (
    "eod",
    "cls",
    "sep",
    "mask",
    "pad",
    "mode_r",
    "mode_s",
    "mode_x",
    "fim_prefix",
    "fim_suffix",
    "fim_middle",
)


def synthetic_vocabulary(size: int, num_sentinels: int = 0) -> Vocabulary:
    """A vocabulary without text: special tokens first, then sentinels (a tenth of all ids, or more if needed).

    Args:
        num_sentinels: how many the objective needs.
    Raises:
        ConfigError: the vocabulary is too small for them.
    """
    roles = {role: index for index, role in enumerate(SYNTHETIC_ROLES)}

    def ordinary_of(size: int) -> int:
        """The id of the first ordinary token."""
        return len(roles) + max(min(100, size // 10), num_sentinels)

    ordinary = ordinary_of(size)
    if ordinary >= size:
        least = next(larger for larger in count(size + 1) if ordinary_of(larger) < larger)
        raise ConfigError(
            f"model.vocab_size={size} is too small for {len(roles)} special tokens, {num_sentinels} sentinels and "
            f"text; use {least} or more"
        )
    is_special = np.arange(size) < ordinary
    special = SpecialTokens(**roles, begin=(), sentinels=tuple(range(len(roles), ordinary)))
    return Vocabulary(size, special, is_special, begins_word=np.arange(size) % 3 > 0)


class SyntheticSamples:
    """Samples of an objective over random text that depends only on (seed, index), with uneven loss weights.

    Uneven weights matter: with equal token counts, a mean of means equals the global mean, and a wrong denominator
    would not show.
    """

    def __init__(self, objective: Objective, vocabulary: Vocabulary, seed: int) -> None:
        assert vocabulary.is_special is not None
        self._objective = objective
        self._first = int(np.flatnonzero(~vocabulary.is_special)[0])
        self._eod = SYNTHETIC_ROLES.index("eod")
        self._weights = 1.0 / torch.arange(1, vocabulary.size - self._first + 1)
        self._seed = seed

    def example(self, index: int) -> Example:
        """Sample `index`; some of its tokens have zero weight, a different fraction in each sample."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + index)
        example = self._objective.example(self._text(generator), stream_key(self._seed, index))
        keep = torch.rand(len(example.labels), generator=generator) < (index % 5 + 2) / 7
        return example._replace(loss_weights=example.loss_weights * keep.numpy())

    def _text(self, generator: torch.Generator) -> Text | SentencePair:
        shape = self._objective.shape
        tokens = self._tokens(shape.tokens, generator)
        if isinstance(shape, WindowShape):
            tokens[shape.tokens // 2] = self._eod  # two documents
            starts = np.arange(0, shape.tokens, 5)
            return Text(tokens, starts if shape.sentences else None)
        first, second, is_next = torch.randint(1, shape.tokens // 2 + 1, (3,), generator=generator).tolist()
        return SentencePair(tokens[:first], tokens[first : first + second], bool(is_next % 2))

    def _tokens(self, count: int, generator: torch.Generator) -> npt.NDArray[np.int64]:
        """Draw token k with probability proportional to 1 / (k + 1) (Zipf, like words): there is something to learn."""
        drawn = torch.multinomial(self._weights, count, replacement=True, generator=generator)
        return (self._first + drawn).numpy()


def synthetic_batches(
    objective: Objective, vocabulary: Vocabulary, first_sample: int, num_micro_batches: int, config: ResolvedConfig
) -> list[MicroBatch]:
    """Consecutive samples as micro-batches."""
    size = config.train.micro_batch_size
    samples = SyntheticSamples(objective, vocabulary, config.train.seed)
    starts = range(first_sample, first_sample + num_micro_batches * size, size)
    return [stack([samples.example(index) for index in range(start, start + size)]) for start in starts]
