"""span_corruption and ul2 against the numbers of T5 and UL2."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config.lengths import denoisers, ul2_lengths
from megatron_lite.config.schema import ObjectiveConfig, ObjectiveName
from megatron_lite.objectives.base import Text
from megatron_lite.objectives.span_corruption import take_out
from tests.unit.objectives import reconstruct
from tests.unit.objectives.samples import (
    EOD,
    FIRST,
    MODE_R,
    MODE_S,
    MODE_X,
    PAD,
    SAMPLES,
    SENTINELS,
    close_to_rate,
    counting,
    fits,
    many,
    objective_of,
    random_window,
)

KEYS = st.integers(0, 2**64 - 1)
SEEDS = st.integers(0, 2**32 - 1)
MODES = {"r": MODE_R, "s": MODE_S, "x": MODE_X}


def test_the_example_of_the_paper() -> None:
    """Figure 2 of arXiv 1910.10683, here with the last word taken out as well, as a text ends with a span."""
    words = ["thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]
    marks = dict(zip(SENTINELS, "XYZ", strict=False)) | dict(zip(counting(10).tolist(), words, strict=True))
    rest, spans = take_out(counting(10), np.array([2, 4]), np.array([2, 2]), np.array(SENTINELS))
    assert " ".join(marks[token] for token in rest.tolist()) == "thank you X me to your party Y"
    assert " ".join(marks[token] for token in spans.tolist()) == "X for inviting Y last week"


@given(length=st.integers(3, 80), seed=SEEDS, key=KEYS,
       density=st.sampled_from([0.0, 0.15, 0.5, 0.8]), mean=st.sampled_from([1.0, 3.0, 8.0]))  # fmt: skip
def test_spans_put_back_give_the_text(length: int, seed: int, key: int, density: float, mean: float) -> None:
    objective = objective_of("span_corruption", length, noise_density=density, mean_span_length=mean)
    window = random_window(np.random.default_rng(seed), objective.shape.tokens)
    example = objective.example(Text(window), key)
    tokens, decoder_tokens = example.inputs
    assert PAD not in tokens
    assert PAD not in example.labels
    assert (example.loss_weights == 1).all()
    assert decoder_tokens.tolist() == [PAD, *example.labels[:-1]]
    assert text_of(tokens, example.labels) == window.tolist()


def text_of(tokens: np.ndarray, labels: np.ndarray) -> list[int]:
    """Of one sample."""
    text = reconstruct.spans(tokens[None], labels[None])[0]
    return text[text != PAD].tolist()


def test_t5_rates_and_spans() -> None:
    """60 tokens: exactly 9 of them (0.15) in 3 spans (mean 3) in each sample, and nothing is padded."""
    objective = objective_of("span_corruption", 55)
    assert (objective.shape.tokens, objective.shape.stride, objective.label_length) == (60, 60, 13)
    samples = many(objective, Text(counting(60)))
    tokens, labels = samples.inputs["tokens"], samples.labels
    assert (samples.weights == 1).all()
    assert (tokens != PAD).all()
    assert ((tokens >= FIRST).sum(1) == 51).all()
    assert ((labels >= FIRST).sum(1) == 9).all()
    assert (reconstruct.spans(tokens, labels)[:, :60] == counting(60)).all()
    spans = segment_lengths(labels)
    assert spans.mean() == 3
    for column in spans.T:
        assert fits(np.bincount(column, minlength=8)[1:], division_chances(9, 3))
    pieces = segment_lengths(np.roll(tokens, 1, axis=1))  # the end comes first, and is not a piece
    assert (pieces.sum(1) == 51).all()
    assert (np.abs(pieces.mean(0) - 17) < 5 * pieces.std(0) / math.sqrt(SAMPLES)).all()


def segment_lengths(marked: np.ndarray) -> np.ndarray:
    """[samples, sentinels]: tokens between each sentinel and the next one or the end; alike in number in all rows."""
    rows, places = np.nonzero((marked >= SENTINELS[0]) & (marked < SENTINELS[0] + len(SENTINELS)) | (marked == EOD))
    places = places.reshape(len(marked), -1)
    assert np.array_equal(rows.reshape(places.shape)[:, 0], np.arange(len(marked)))
    return np.diff(places) - 1


def division_chances(total: int, count: int) -> np.ndarray:
    """Of 1, 2, ... for one part of a uniformly random division of `total` into `count` positive parts."""
    ways = [math.comb(total - part - 1, count - 2) for part in range(1, total - count + 2)]
    return np.array(ways) / math.comb(total - 1, count - 1)


def test_noise_is_where_t5_puts_it() -> None:
    """Share of noise at each place, against `random_spans_noise_mask` written down step by step."""
    samples = many(objective_of("span_corruption", 55), Text(counting(60)), 10_000)
    noise = np.zeros(60)
    np.add.at(noise, samples.labels[samples.labels >= FIRST] - FIRST, 1)
    rng = np.random.default_rng(0)
    expected = np.mean([t5_noise_mask(rng, 60, 9, 3) for _ in range(10_000)], axis=0)
    assert np.abs(noise / 10_000 - expected).max() < 5 * math.sqrt(2 * 0.25 / 10_000)


def t5_noise_mask(rng: np.random.Generator, length: int, noise: int, spans: int) -> np.ndarray:
    def segmentation(items: int) -> list[int]:
        first_in_segment = np.concatenate([[0], rng.permutation([1] * (spans - 1) + [0] * (items - spans))])
        return np.bincount(np.cumsum(first_in_segment)).tolist()

    lengths = [part for both in zip(segmentation(length - noise), segmentation(noise), strict=True) for part in both]
    return np.repeat([False, True] * spans, lengths)


@given(length=st.integers(8, 80), seed=SEEDS, key=KEYS, mode_tokens=st.booleans())
def test_denoisers_give_the_beginning_of_the_window(length: int, seed: int, key: int, mode_tokens: bool) -> None:
    objective = objective_of("ul2", length, ul2_mode_tokens=mode_tokens)
    window = random_window(np.random.default_rng(seed), objective.shape.tokens)
    example = objective.example(Text(window), key)
    text = text_of(*reconstruct.unpadded(example))
    assert text == window[: len(text)].tolist()
    assert example.inputs[2][0] == PAD
    lengths = ul2_lengths(ObjectiveConfig(name=ObjectiveName.ul2, ul2_mode_tokens=mode_tokens), length)
    assert len(text) in {one.window for one in lengths.values()}


def test_ul2_mixture() -> None:
    """Each denoiser with its mode token, as often as its weight says, with its own rate and number of spans."""
    weights = [1.0, 2.0, 3.0, 0.0, 1.0, 2.0, 1.0]
    config = ObjectiveConfig(name=ObjectiveName.ul2, ul2_weights=weights)
    lengths = ul2_lengths(config, 128)
    objective = objective_of("ul2", 128, ul2_weights=weights)
    assert objective.shape.tokens == max(one.window for one in lengths.values())
    samples = many(objective, Text(counting(objective.shape.tokens)))
    labels, tokens = samples.labels, samples.inputs["tokens"]
    spans = ((labels >= SENTINELS[0]) & (labels <= SENTINELS[-1])).sum(1)
    noise = (labels >= FIRST).sum(1)
    total = noise + (tokens >= FIRST).sum(1)
    text = reconstruct.spans(tokens, labels)
    places = np.arange(text.shape[1])
    assert np.array_equal(text, np.where(places < total[:, None], FIRST + places, PAD))
    seen = 0
    for place, (window, longest, count) in lengths.items():
        mode = MODES[denoisers(ObjectiveConfig())[place].mode]
        is_it = (tokens[:, 0] == mode) & (total == window) & (spans == count)
        assert close_to_rate(is_it.sum(), SAMPLES, weights[place] / 10)
        seen += is_it.sum()
        predicted = samples.weights[is_it].sum(1)
        assert predicted.max() == longest
        if mode == MODE_S:  # a suffix of a quarter on average, of any length alike
            suffixes = np.bincount(noise[is_it])[1:]
            assert len(suffixes) == 2 * round(0.25 * window) - 1
            assert fits(suffixes, np.full(len(suffixes), 1 / len(suffixes)))
        else:
            assert (predicted == longest).all()
            density = denoisers(ObjectiveConfig())[place].noise_density
            assert abs(noise[is_it] / window - density).max() <= 0.5 / window + 1e-12
    assert seen == SAMPLES


def test_the_s_denoiser_is_a_prefix_language_model() -> None:
    objective = objective_of("ul2", 64, ul2_weights=[0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    for key in range(100):
        tokens, used, _ = objective.example(Text(counting(objective.shape.tokens)), key).inputs
        assert tokens[:used].tolist() == [MODE_S, *counting(used - 3).tolist(), SENTINELS[0], EOD]


def test_default_weights_are_equal_and_modes_can_be_left_out() -> None:
    objective = objective_of("ul2", 64, ul2_mode_tokens=False)
    samples = many(objective, Text(counting(objective.shape.tokens)), 5000)
    assert (samples.inputs["tokens"][:, 0] == FIRST).all()
    assert ObjectiveConfig().ul2_weights == [1.0] * len(denoisers(ObjectiveConfig()))


@pytest.mark.parametrize("decoder", [20, 64, 200])
def test_a_given_decoder_length_is_kept(decoder: int) -> None:
    objective = objective_of("ul2", 64, decoder_seq_length=decoder)
    assert objective.label_length == decoder
    example = objective.example(Text(counting(objective.shape.tokens)), 3)
    text = text_of(*reconstruct.unpadded(example))
    assert text == counting(len(text)).tolist()
