"""causal_lm, prefix_lm and fill_in_the_middle against their definitions and the numbers of their papers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.objectives.base import Text
from tests.unit.objectives import reconstruct
from tests.unit.objectives.samples import (
    EOD,
    FIM_MIDDLE,
    FIM_PREFIX,
    FIM_SUFFIX,
    FIRST,
    SAMPLES,
    close_to_rate,
    counting,
    fits,
    many,
    objective_of,
    random_window,
    read_only,
)

KEYS = st.integers(0, 2**64 - 1)
TOKENS = st.sampled_from([EOD, FIRST, FIRST + 1, FIRST + 2])


@pytest.mark.parametrize("name", ["causal_lm", "prefix_lm"])
@given(tokens=st.lists(TOKENS, min_size=2, max_size=30), key=KEYS)
def test_the_text_comes_back(name: str, tokens: list[int], key: int) -> None:
    objective = objective_of(name, len(tokens) - 1)
    assert reconstruct.next_token(objective.example(Text(read_only(tokens)), key)) == tokens


def test_windows_overlap_by_one_token() -> None:
    for name in ("causal_lm", "prefix_lm", "fill_in_the_middle"):
        shape = objective_of(name, 48).shape
        assert (shape.tokens, shape.stride, shape.sentences) == (49, 48, False)


def test_causal_lm_predicts_everything() -> None:
    samples = many(objective_of("causal_lm", 16), Text(counting(17)))
    assert (samples.inputs["tokens"] == counting(16)).all()
    assert (samples.labels == counting(17)[1:]).all()
    assert (samples.weights == 1).all()
    example = objective_of("causal_lm", 4).example(Text(read_only([90, 91, EOD, 92, 93])), 0)
    assert example.inputs[0].tolist() == [90, 91, EOD, 92]
    assert example.labels.tolist() == [91, EOD, 92, 93]
    assert example.loss_weights.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["causal_lm", "prefix_lm", "fill_in_the_middle"])
def test_what_follows_a_document_can_be_left_out_of_the_loss(name: str) -> None:
    objective = objective_of(name, 40, mask_loss_after_eod=True)
    plain = objective_of(name, 40)
    for key in range(50):
        text = Text(random_window(np.random.default_rng(key), 41, 0.2))
        masked, unmasked = objective.example(text, key), plain.example(text, key)
        assert np.array_equal(masked.inputs[0], unmasked.inputs[0])
        assert np.array_equal(masked.loss_weights, unmasked.loss_weights * (masked.inputs[0] != EOD))


def test_prefix_lengths_are_uniform_and_the_suffix_is_predicted() -> None:
    length = 32
    samples = many(objective_of("prefix_lm", length), Text(counting(length + 1)))
    prefixes = samples.inputs["prefix_lengths"]
    assert fits(np.bincount(prefixes, minlength=length + 1)[1:], np.full(length, 1 / length))
    label_places = 1 + np.arange(length)  # in the window
    assert np.array_equal(samples.weights, label_places >= prefixes[:, None])
    assert (samples.inputs["tokens"] == counting(length)).all()
    assert (samples.labels == counting(length + 1)[1:]).all()
    assert samples.weights.sum(1).min() == 1  # never nothing to learn


@given(tokens=st.lists(TOKENS, min_size=4, max_size=40), key=KEYS, rate=st.sampled_from([0.0, 0.5, 1.0]))
def test_rearranged_documents_can_be_put_in_order(tokens: list[int], key: int, rate: float) -> None:
    objective = objective_of("fill_in_the_middle", len(tokens) - 1, fim_fraction=rate)
    window = reconstruct.next_token(objective.example(Text(read_only(tokens)), key))
    moved = window.count(FIM_PREFIX)
    assert moved == window.count(FIM_SUFFIX) == window.count(FIM_MIDDLE)
    assert len(window) == len(tokens)
    assert reconstruct.in_order(window) == tokens[: len(tokens) - 3 * moved]
    if rate == 1:
        started = ([EOD, *tokens][place] == EOD != tokens[place] for place in range(len(tokens)))
        first_of_documents = [place for place, starts in enumerate(started) if starts]
        untouched = [place for place in first_of_documents[moved:] if place < len(tokens) - 3 * moved]
        assert all(len(tokens) - 3 * moved - place <= 3 for place in untouched)  # there was no room


def test_fim_rates_and_cuts() -> None:
    """Half of the documents, half of them in SPM order; each pair of cuts is equally likely (arXiv 2207.14255)."""
    samples = many(objective_of("fill_in_the_middle", 48), Text(counting(49)))
    windows = np.concatenate([samples.inputs["tokens"], samples.labels[:, -1:]], axis=1)  # [samples, 49]
    moved = windows[:, 0] == FIM_PREFIX
    assert close_to_rate(moved.sum(), SAMPLES, 0.5)
    assert (windows[~moved] == counting(49)).all()
    windows = windows[moved]
    spm = windows[:, 1] == FIM_SUFFIX
    empty_prefix = smaller_of_two(46)[0]  # then PSM begins with <PRE> <SUF>, too
    assert close_to_rate(spm.sum(), len(spm), 0.5 + 0.5 * empty_prefix)
    assert (reconstruct.one_document(windows)[:, :46] == counting(46)).all()


def test_fim_orders_and_cuts_where_they_can_be_recognised() -> None:
    content, count = 46, 20_000
    for rate in (0.0, 1.0):
        objective = objective_of("fill_in_the_middle", content + 2, fim_fraction=1.0, fim_spm_fraction=rate)
        samples = many(objective, Text(counting(content + 3)), count)
        windows = np.concatenate([samples.inputs["tokens"], samples.labels[:, -1:]], axis=1)
        at_suffix, at_middle = (np.argmax(windows == token, axis=1) for token in (FIM_SUFFIX, FIM_MIDDLE))
        suffix = at_middle - at_suffix - 1
        if rate:
            assert (at_suffix == 1).all()
        else:
            prefix = at_suffix - 1
            assert ((prefix >= 0) & (prefix + suffix <= content)).all()
            assert fits(np.bincount(prefix, minlength=content + 1), smaller_of_two(content))
        assert fits(np.bincount(suffix, minlength=content + 1), smaller_of_two(content))


def smaller_of_two(largest: int) -> np.ndarray:
    """Chances of 0 ... largest for the smaller of two uniform draws."""
    values = np.arange(largest + 1)
    return (2 * (largest - values) + 1) / (largest + 1) ** 2


def test_fim_rate_counts_documents_not_windows() -> None:
    rng = np.random.default_rng(3)
    objective = objective_of("fill_in_the_middle", 64, fim_fraction=0.3)
    moved = documents = 0
    for key in range(4000):
        tokens = rng.integers(FIRST, FIRST + 9, 65)
        tokens[9::10] = EOD
        window = reconstruct.next_token(objective.example(Text(read_only(tokens)), key))[:40]  # far from the end
        starts = [place for place in range(40) if place == 0 or window[place - 1] == EOD]
        documents += len(starts)
        moved += sum(window[place] == FIM_PREFIX for place in starts)
    assert close_to_rate(moved, documents, 0.3)


def test_documents_without_text_stay() -> None:
    objective = objective_of("fill_in_the_middle", 9, fim_fraction=1.0)
    window = read_only([EOD] * 10)
    assert reconstruct.next_token(objective.example(Text(window), 0)) == [EOD] * 10
