"""A small vocabulary, windows of text, and many samples at once for the tests of objectives."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_lite.config.schema import DataConfig, ObjectiveConfig, ObjectiveName
from megatron_lite.data.special import SpecialTokens, Vocabulary
from megatron_lite.objectives.base import Objective, SentencePair, Text, WindowShape
from megatron_lite.objectives.build import build_objective

SAMPLES = 100_000
EOD, CLS, SEP, MASK, PAD = range(5)
SENTINELS = tuple(range(5, 75))
MODE_R, MODE_S, MODE_X, FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE = range(75, 81)
FIRST = 81  # of the ordinary tokens
SIZE = FIRST + 900
SPECIAL = SpecialTokens(
    eod=EOD, cls=CLS, sep=SEP, mask=MASK, pad=PAD, sentinels=SENTINELS,
    mode_r=MODE_R, mode_s=MODE_S, mode_x=MODE_X,
    fim_prefix=FIM_PREFIX, fim_suffix=FIM_SUFFIX, fim_middle=FIM_MIDDLE,
)  # fmt: skip
IDS = np.arange(SIZE)
VOCABULARY = Vocabulary(SIZE, SPECIAL, is_special=IDS < FIRST, begins_word=IDS % 3 == 0)


def objective_of(name: str, seq_length: int, *, mask_loss_after_eod: bool = False, **settings: Any) -> Any:
    config = ObjectiveConfig(name=ObjectiveName(name), **settings)
    data = DataConfig(seq_length=seq_length, mask_loss_after_eod=mask_loss_after_eod)
    return build_objective(config, data, VOCABULARY)


def read_only(tokens: Any) -> npt.NDArray[np.int64]:
    """Tokens that nobody may write to: shards are mapped files."""
    array = np.array(tokens, np.int64)
    array.flags.writeable = False
    return array


def counting(length: int) -> npt.NDArray[np.int64]:
    """A window without the end of a document, in which each token shows its place: FIRST, FIRST + 1, ..."""
    return read_only(FIRST + np.arange(length))


def random_window(rng: np.random.Generator, length: int, end_rate: float = 0.1) -> npt.NDArray[np.int64]:
    tokens = rng.integers(FIRST, SIZE, length)
    tokens[rng.random(length) < end_rate] = EOD
    return read_only(tokens)


def random_text(rng: np.random.Generator, objective: Objective, end_rate: float = 0.1) -> Text | SentencePair:
    """Something that this objective takes."""
    if isinstance(objective.shape, WindowShape):
        tokens = random_window(rng, objective.shape.tokens, end_rate)
        starts = (rng.random(len(tokens)) < 0.2) | (np.concatenate([[EOD], tokens[:-1]]) == EOD)
        return Text(tokens, read_only(np.flatnonzero(starts)) if objective.shape.sentences else None)
    room = objective.shape.tokens
    first = int(rng.integers(1, room))
    second = int(rng.integers(1, room - first + 1))
    parts = (read_only(rng.integers(FIRST, SIZE, length)) for length in (first, second))
    return SentencePair(*parts, is_next=bool(rng.random() < 0.5))


class Samples(NamedTuple):
    """Many samples of one objective; the first dimension is the sample. Two bytes a token: there are many."""

    inputs: dict[str, npt.NDArray[np.int16]]
    labels: npt.NDArray[np.int16]
    weights: npt.NDArray[np.float32]


def many(objective: Objective, text: Text, count: int = SAMPLES) -> Samples:
    """What the same text becomes under the keys 0 ... count - 1."""
    fields = objective.inputs
    inputs = [np.empty((count, *([] if field.length is None else [field.length])), np.int16) for field in fields]
    labels = np.empty((count, objective.label_length), np.int16)
    weights = np.empty(labels.shape, np.float32)
    for key in range(count):
        example = objective.example(text, key)
        for column, value in zip(inputs, example.inputs, strict=True):
            column[key] = value
        labels[key], weights[key] = example.labels, example.loss_weights
    return Samples({field.name: column for field, column in zip(fields, inputs, strict=True)}, labels, weights)


def close_to_rate(successes: int, trials: int, rate: float) -> bool:
    """Within five standard deviations of a binomial distribution."""
    return abs(successes - trials * rate) < 5 * math.sqrt(trials * rate * (1 - rate))


def fits(counts: Any, chances: Any) -> bool:
    """Whether these counts are a likely sample of a distribution: chi-square below five deviations above its mean."""
    counts, chances = np.asarray(counts, float), np.asarray(chances, float)
    expected = chances * counts.sum()
    assert math.isclose(chances.sum(), 1)
    assert expected.min() > 5, "too few samples for this test"
    freedom = len(counts) - 1
    return bool(((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom))
