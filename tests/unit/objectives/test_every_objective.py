"""What holds for all objectives: shapes, purity, and numbers that never change between versions."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest

from megatron_lite.config.schema import DataConfig, ObjectiveConfig, ObjectiveName
from megatron_lite.data.sampler import mix64, stream_key
from megatron_lite.data.special import SpecialTokens, Vocabulary
from megatron_lite.data.tokenizer.needs import MODES, NEED_SENTINELS, NEED_TOKENIZER, NEEDS
from megatron_lite.errors import ConfigError
from megatron_lite.models.activations import Activations
from megatron_lite.objectives.base import Example, Objective, PairShape, SentencePair, Text
from megatron_lite.objectives.build import OBJECTIVES, build_objective
from tests.unit.objectives.samples import (
    EOD,
    FIRST,
    SENTINELS,
    SIZE,
    SPECIAL,
    VOCABULARY,
    objective_of,
    random_text,
)

NAMES = [name.value for name in ObjectiveName]
SMALLEST = {
    "causal_lm": 1,
    "prefix_lm": 1,
    "fill_in_the_middle": 3,
    "masked_lm": 3,
    "masked_lm_nsp": 5,
    "span_corruption": 3,
    "bart_denoising": 3,
    "ul2": 6,  # the decoder has half of them
}


def test_every_objective_of_the_schema_is_built() -> None:
    assert list(OBJECTIVES) == list(ObjectiveName)


def arrays(example: Example) -> list[np.ndarray]:
    return [np.asarray(part) for part in (*example.inputs, example.labels, example.loss_weights)]


def check_shapes(objective: Objective, example: Example) -> None:
    assert len(example.inputs) == len(objective.inputs)
    for field, value in zip(objective.inputs, example.inputs, strict=True):
        assert field.name in Activations.__dataclass_fields__
        assert isinstance(value, int) if field.length is None else value.shape == (field.length,)
        assert np.asarray(value).dtype == np.int64
    assert example.labels.shape == example.loss_weights.shape == (objective.label_length,)
    assert (example.labels.dtype, example.loss_weights.dtype) == (np.int64, np.float32)
    assert ((example.labels >= 0) & (example.labels < SIZE)).all()
    assert np.isin(example.loss_weights, [0, 1]).all()
    assert (example.sequence_label is not None) == objective.has_sequence_label


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_fixed_from_the_smallest_length_on(name: str) -> None:
    rng = np.random.default_rng(0)
    for seq_length in [*range(SMALLEST[name], 20), 64, 129]:
        objective = objective_of(name, seq_length)
        for end_rate in (0.0, 0.1, 0.5, 1.0):
            for key in range(10):
                check_shapes(objective, objective.example(random_text(rng, objective, end_rate), key))


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_pure_functions_of_text_and_key(name: str) -> None:
    rng = np.random.default_rng(1)
    first, second = objective_of(name, 48), objective_of(name, 48)
    text = random_text(rng, first)
    seen = set()
    for index in range(30):
        key = stream_key(7, index)
        one = arrays(first.example(text, key))
        first.example(random_text(rng, first), key + 1)  # leaves nothing behind
        other = arrays(first.example(text, key))
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
        assert all(np.array_equal(a, b) for a, b in zip(one, arrays(second.example(text, key)), strict=True))
        seen.add(b"".join(array.tobytes() for array in one))
    assert len(seen) == 1 if name == "causal_lm" else len(seen) > 15


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_pinned(name: str) -> None:
    """These numbers stand for what every run was trained on: a change would make old runs unrepeatable."""
    objective = objective_of(name, 48)
    total = 0
    for index in range(20):
        for array in arrays(objective.example(text_without_numpy(objective, index), stream_key(1234, index))):
            total = zlib.crc32(array.tobytes(), total)
    assert total == PINNED[name]


def text_without_numpy(objective: Objective, index: int) -> Text | SentencePair:
    """A text with documents of 17 tokens and sentences of 5, free of numpy's random numbers: these may change."""
    tokens = np.array([FIRST + mix64(1000 * index + place) % 900 for place in range(objective.shape.tokens)])
    if isinstance(objective.shape, PairShape):
        return SentencePair(tokens[: 10 + index], tokens[10 + index : 30], index % 2 == 0)
    tokens[16::17] = EOD
    starts = np.union1d(np.arange(0, len(tokens), 5), np.arange(0, len(tokens), 17))
    return Text(tokens, starts if objective.shape.sentences else None)


PINNED = {
    "causal_lm": 0xBF89F38B,
    "prefix_lm": 0xF570B083,
    "fill_in_the_middle": 0xFBF5D89A,
    "masked_lm": 0x4E112138,
    "masked_lm_nsp": 0x4C5295A0,
    "span_corruption": 0xADCBC57D,
    "bart_denoising": 0xC5226C78,
    "ul2": 0xB8539FEE,
}


@pytest.mark.parametrize("name", NAMES)
def test_an_objective_takes_the_roles_that_it_is_said_to_need(name: str) -> None:
    """With these it is built and gives samples; without any one of them it could not be built."""
    needs = NEEDS[ObjectiveName(name)] + (MODES if name == "ul2" else ())
    config, data = ObjectiveConfig(name=ObjectiveName(name)), DataConfig(seq_length=64)
    rng = np.random.default_rng(0)
    for lacking in (None, *needs):
        roles = {role: getattr(SPECIAL, role) for role in needs if role != lacking}
        special = SpecialTokens(**roles, sentinels=SENTINELS if name in NEED_SENTINELS else ())
        vocabulary = Vocabulary(SIZE, special, VOCABULARY.is_special if name in NEED_TOKENIZER else None)
        if lacking is None:
            objective = build_objective(config, data, vocabulary)
            check_shapes(objective, objective.example(random_text(rng, objective), 1))
        else:
            with pytest.raises(AssertionError):
                build_objective(config, data, vocabulary)


@pytest.mark.parametrize(("name", "needed"), [("span_corruption", 28), ("ul2", 64)])
def test_sentinels_have_been_counted_before(name: str, needed: int) -> None:
    config, data = ObjectiveConfig(name=ObjectiveName(name)), DataConfig(seq_length=512)
    vocabulary = Vocabulary(SIZE, replace(SPECIAL, sentinels=SENTINELS[:needed]))
    build_objective(config, data, vocabulary)
    with pytest.raises(AssertionError):
        build_objective(config, data, replace(vocabulary, special=replace(SPECIAL, sentinels=SENTINELS[: needed - 1])))


def test_whole_words_of_an_unknown_tokenizer_are_refused() -> None:
    vocabulary = Vocabulary(SIZE, SPECIAL, VOCABULARY.is_special)
    config = ObjectiveConfig(name=ObjectiveName.masked_lm, whole_word=True)
    with pytest.raises(ConfigError, match=r"objective.whole_word=true needs a tokenizer"):
        build_objective(config, DataConfig(), vocabulary)
