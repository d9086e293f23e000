"""bart_denoising against its paper: 30 % of the tokens in Poisson(3) spans, and shuffled sentences."""

from __future__ import annotations

from collections import Counter
from itertools import chain, permutations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.objectives.base import Text
from megatron_lite.objectives.draws import poisson_table
from tests.unit.objectives import reconstruct
from tests.unit.objectives.samples import (
    CLS,
    EOD,
    FIRST,
    MASK,
    PAD,
    SAMPLES,
    SEP,
    counting,
    fits,
    many,
    objective_of,
    random_text,
    read_only,
)

KEYS = st.integers(0, 2**64 - 1)
SEEDS = st.integers(0, 2**32 - 1)


@given(length=st.integers(3, 80), seed=SEEDS, key=KEYS, rate=st.sampled_from([0.0, 0.3, 1.0]),
       mean=st.sampled_from([0.05, 1.0, 3.0, 20.0]))  # fmt: skip
def test_the_target_is_the_text_and_the_input_its_rest(
    length: int, seed: int, key: int, rate: float, mean: float
) -> None:
    objective = objective_of("bart_denoising", length, infill_fraction=rate, infill_span_length=mean)
    text = random_text(np.random.default_rng(seed), objective)
    example = objective.example(text, key)
    assert reconstruct.denoised(example) == text.tokens.tolist()
    read = reconstruct.unpadded(example)[0].tolist()
    assert (read[0], read[-1], example.inputs[2][0]) == (CLS, SEP, SEP)
    kept = Counter(token for token in read[1:-1] if token != MASK)
    assert kept <= Counter(text.tokens.tolist())
    assert kept.total() == length - 2 - round(rate * (length - 2))


@given(length=st.integers(3, 80), key=KEYS, mean=st.sampled_from([0.3, 3.0]))
def test_without_shuffling_masks_stand_where_tokens_are_missing(length: int, key: int, mean: float) -> None:
    objective = objective_of("bart_denoising", length, permute_sentences=False, infill_span_length=mean)
    assert not objective.shape.sentences
    read = reconstruct.unpadded(objective.example(Text(counting(length - 2)), key))[0]
    following, masks = FIRST, 0
    for token in [*read[1:-1].tolist(), FIRST + length - 2]:
        if token == MASK:
            masks += 1
            continue
        assert token == following or (token > following and masks)
        following, masks = token + 1, 0


def test_infilling_rate_and_spans_at_full_length() -> None:
    """510 tokens: exactly 153 of them (0.3) are covered, in as many spans as Poisson(3) needs for that."""
    objective, text = objective_of("bart_denoising", 512, permute_sentences=False), Text(counting(510))
    masks, kept = np.empty(SAMPLES, np.int64), np.empty(SAMPLES, np.int64)
    for key in range(SAMPLES):
        example = objective.example(text, key)
        masks[key] = np.count_nonzero(example.inputs[0] == MASK)
        kept[key] = np.count_nonzero(example.inputs[0] >= FIRST)
        assert np.array_equal(example.labels[1:-1], text.tokens)
    assert (kept == 357).all()
    assert fits(np.bincount(masks.clip(38, 66), minlength=67)[38:], span_count_chances(153, 38, 66))
    assert abs(153 / masks.mean() - 3) < 0.05  # the last span is cut, hence a bit below 3


def span_count_chances(covered: int, fewest: int, most: int) -> np.ndarray:
    """Of `fewest` or fewer, ..., `most` or more Poisson(3) spans until `covered` tokens are.

    The sum of k of them is Poisson(3 k): there are more than k spans where that is below `covered`.
    """
    more_than = [poisson_table(3.0 * k)[covered - 1] for k in range(fewest, most)]
    return -np.diff([1.0, *more_than, 0.0])


def test_spans_of_a_short_text_are_spread_evenly() -> None:
    """By symmetry a place is covered as often as its mirror image, and inner places at nearly the rate itself."""
    samples = many(objective_of("bart_denoising", 62, permute_sentences=False), Text(counting(60)), 20_000)
    tokens, lengths = samples.inputs["tokens"], samples.inputs["lengths"]
    kept = tokens[tokens >= FIRST].reshape(-1, 42)
    assert (np.diff(kept) > 0).all()
    masks = (tokens == MASK).sum(1)
    assert np.array_equal(lengths, 42 + masks + 2)
    assert np.array_equal((tokens == PAD).sum(1), 62 - lengths)
    assert (np.count_nonzero(samples.weights, axis=1) == 62).all()
    assert fits(np.bincount(masks.clip(3, 13), minlength=14)[3:], span_count_chances(18, 3, 13))
    covered = 1 - np.bincount(kept.ravel() - FIRST, minlength=60) / len(kept)
    assert np.abs(covered - covered[::-1]).max() < 0.02
    assert np.abs(covered[10:50] - 0.3).max() < 0.03


def test_sentences_are_in_any_order_and_documents_stay() -> None:
    sentences = [[90, 91], [92], [93, 94, 95], [96]]
    other = [97, 98, 99]
    window = read_only([*chain(*sentences), EOD, *other, EOD, EOD])
    text = Text(window, read_only([0, 2, 3, 6, 8, 12]))
    objective = objective_of("bart_denoising", len(window) + 2, infill_fraction=0.0)
    samples = many(objective, text, 24_000)
    read = samples.inputs["tokens"][:, 1:-1]
    assert (read[:, 7:] == [EOD, *other, EOD, EOD]).all()
    seen = Counter(map(tuple, read[:, :7].tolist()))
    orders = [tuple(chain(*order)) for order in permutations(sentences)]
    assert seen.keys() == set(orders)
    assert fits([seen[order] for order in orders], np.full(24, 1 / 24))
    assert (samples.labels[:, 1:-1] == window).all()


def test_small_spans_never_make_the_input_too_long() -> None:
    """A Poisson mean of 0.05 has twenty empty spans for every token; only those with room are kept."""
    objective = objective_of("bart_denoising", 62, permute_sentences=False, infill_span_length=0.05)
    samples = many(objective, Text(counting(60)), 500)
    assert samples.inputs["lengths"].max() == 62
    assert ((samples.inputs["tokens"] >= FIRST).sum(1) == 42).all()
