"""masked_lm and masked_lm_nsp against the numbers of BERT and RoBERTa."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.objectives.base import SentencePair, Text
from megatron_lite.objectives.draws import Draws
from tests.unit.objectives import reconstruct
from tests.unit.objectives.samples import (
    CLS,
    EOD,
    FIRST,
    MASK,
    PAD,
    SAMPLES,
    SEP,
    SIZE,
    VOCABULARY,
    close_to_rate,
    counting,
    fits,
    many,
    objective_of,
    read_only,
)

KEYS = st.integers(0, 2**64 - 1)
TOKENS = st.sampled_from([EOD, *range(FIRST, FIRST + 12)])


@given(tokens=st.lists(TOKENS, min_size=1, max_size=40), key=KEYS, whole_word=st.booleans())
def test_the_text_comes_back(tokens: list[int], key: int, whole_word: bool) -> None:
    objective = objective_of("masked_lm", len(tokens) + 2, whole_word=whole_word)
    example = objective.example(Text(read_only(tokens)), key)
    assert reconstruct.masked(example) == example.labels.tolist() == [CLS, *tokens, SEP]
    ordinary = sum(token != EOD for token in tokens)
    chosen = example.loss_weights > 0
    assert not VOCABULARY.is_special[example.labels[chosen]].any()
    if ordinary == 0:
        assert not chosen.any()
    elif not whole_word:
        assert chosen.sum() == max(1, round(0.15 * ordinary))


def test_roberta_masks_15_percent_80_10_10() -> None:
    """40 tokens: exactly 6 are chosen in each sample, each as often; the random ones are uniform."""
    samples = many(objective_of("masked_lm", 42), Text(counting(40)))
    chosen = samples.weights > 0
    assert (chosen.sum(1) == 6).all()
    assert not chosen[:, [0, -1]].any()
    assert (np.where(chosen, samples.labels, samples.inputs["tokens"])[:, 1:-1] == counting(40)).all()
    assert fits(chosen.sum(0)[1:-1], np.full(40, 1 / 40))
    read, text = samples.inputs["tokens"][chosen], samples.labels[chosen]
    check_80_10_10(read, text)
    others = np.bincount(read[(read != MASK) & (read != text)] - FIRST, minlength=SIZE - FIRST)[40:]
    assert fits(others, np.full(len(others), 1 / len(others)))  # the first 40 are the text itself


def check_80_10_10(read: np.ndarray, text: np.ndarray) -> None:
    """A random token may be, once in so many, the right one."""
    total, ordinary = len(read), SIZE - FIRST
    assert close_to_rate((read == MASK).sum(), total, 0.8)
    assert close_to_rate((read == text).sum(), total, 0.1 * (1 + 1 / ordinary))
    assert close_to_rate(((read != MASK) & (read != text)).sum(), total, 0.1 * (1 - 1 / ordinary))


def test_rates_are_settings() -> None:
    settings = {"masked_fraction": 0.5, "mask_token_fraction": 0.3, "random_token_fraction": 0.6}
    samples = many(objective_of("masked_lm", 42, **settings), Text(counting(40)), 5000)
    chosen = samples.weights > 0
    assert (chosen.sum(1) == 20).all()
    read, text = samples.inputs["tokens"][chosen], samples.labels[chosen]
    assert close_to_rate((read == MASK).sum(), len(read), 0.3)
    assert close_to_rate((read == text).sum(), len(read), 0.1 + 0.6 / 900)


def test_epochs_have_fresh_masks() -> None:
    objective = objective_of("masked_lm", 42)
    text = Text(counting(40))
    masks = {tuple(np.flatnonzero(objective.example(text, key).loss_weights)) for key in range(100)}
    assert len(masks) == 100


def test_whole_words_are_masked_together() -> None:
    """Words of three tokens: 2 of 14 words; each word as often as any other, apart from the cut-off ones."""
    text = Text(counting(42))  # tokens that 3 divides begin a word, as FIRST does
    samples = many(objective_of("masked_lm", 44, whole_word=True), text)
    words = (samples.weights[:, 1:-1] > 0).reshape(-1, 14, 3)
    assert (words.all(2) == words.any(2)).all()
    assert (words.any(2).sum(1) == 2).all()  # round(0.15 x 42) = 6 tokens
    assert fits(words.any(2).sum(0), np.full(14, 1 / 14))


def test_whole_words_never_lead_over_the_count() -> None:
    rng = np.random.default_rng(0)
    objective = objective_of("masked_lm", 66, whole_word=True)
    shares = []
    for key in range(3000):
        tokens = rng.integers(FIRST, SIZE, 64)
        tokens[rng.random(64) < 0.05] = EOD
        example = objective.example(Text(read_only(tokens)), key)
        chosen = (example.loss_weights > 0)[1:-1]
        count = round(0.15 * (tokens != EOD).sum())
        begins = (tokens % 3 == 0) | (tokens == EOD) | (np.concatenate([[EOD], tokens[:-1]]) == EOD)
        word = np.cumsum(begins)
        taken = np.unique(word[chosen])
        assert chosen.sum() <= count or len(taken) == 1
        assert np.array_equal(chosen, np.isin(word, taken))
        shares.append(chosen.sum() / count)
    assert np.mean(shares) > 0.98


def test_a_word_longer_than_the_count_is_masked_alone() -> None:
    tokens = read_only([FIRST, *[FIRST + 1] * 19])
    example = objective_of("masked_lm", 22, whole_word=True).example(Text(tokens), 0)
    assert example.loss_weights.sum() == 20


def pairs(count: int, room: int) -> list[SentencePair]:
    """Pairs as a source makes them: of any lengths, half of them real neighbours."""
    draws = Draws(2024)
    tokens = counting(room)
    made = []
    for _ in range(count):
        total = 2 + draws.below(room - 1)
        first = 1 + draws.below(total - 1)
        made.append(SentencePair(tokens[:first], tokens[first:total], draws.uniform() < 0.5))
    return made


def test_bert_pairs() -> None:
    """[CLS] A [SEP] B [SEP] with segments, padding, its label, and 15 % of the ordinary tokens."""
    length = 48
    objective = objective_of("masked_lm_nsp", length)
    assert (objective.shape.tokens, objective.shape.next_fraction, objective.shape.short_fraction) == (45, 0.5, 0.1)
    given_pairs = pairs(SAMPLES, length - 3)
    examples = [objective.example(pair, key) for key, pair in enumerate(given_pairs)]
    tokens, segments, lengths = (np.array(column) for column in zip(*(e.inputs for e in examples), strict=True))
    labels, chosen = np.array([e.labels for e in examples]), np.array([e.loss_weights for e in examples]) > 0
    first = np.array([len(pair.first) for pair in given_pairs])[:, None]
    second = np.array([len(pair.second) for pair in given_pairs])[:, None]
    places = np.arange(length)
    end = first + second + 3
    assert np.array_equal(lengths[:, None], end)
    assert np.array_equal(segments, (places >= first + 2) & (places < end))
    text = np.select([places == 0, places <= first, places == first + 1, places < end - 1, places < end],
                     [CLS, FIRST + places - 1, SEP, FIRST + places - 2, SEP], PAD)  # fmt: skip
    assert np.array_equal(labels, text)
    assert np.array_equal(tokens[~chosen], labels[~chosen])
    counts = np.maximum(1, np.round(0.15 * (first + second))[:, 0])
    assert np.array_equal(chosen.sum(1), counts)
    assert (labels[chosen] >= FIRST).all()
    check_80_10_10(tokens[chosen], labels[chosen])
    assert [e.sequence_label for e in examples] == [int(not pair.is_next) for pair in given_pairs]


@pytest.mark.parametrize(("first", "second"), [(1, 1), (44, 1), (1, 44)])
def test_pairs_at_their_limits(first: int, second: int) -> None:
    pair = SentencePair(counting(first), counting(second), True)
    example = objective_of("masked_lm_nsp", 48).example(pair, 5)
    assert example.inputs[2] == first + second + 3
    assert reconstruct.masked(example) == example.labels.tolist()
