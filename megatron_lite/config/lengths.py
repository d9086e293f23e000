"""How many tokens of text an objective puts into sequences of fixed length: pure arithmetic, each formula once.

s: positions of the encoder (data.seq_length), d: positions of the decoder, n: tokens of text in a window. A ValueError
means that the settings leave no room; its text follows `key=value`.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Literal, NamedTuple

from megatron_lite.config.schema import ObjectiveConfig, ObjectiveName

ENDS = 2  # [CLS] ... [SEP] around a text
PAIR_ENDS = 3  # [CLS] A [SEP] B [SEP]
TRAINED_SENTINELS = 100  # of a tokenizer trained here, as in T5's
SMALLEST_BPE = 256 + 111  # vocabulary size of a tokenizer trained here: the bytes, and what objectives need
FIM_TOKENS = 3  # added to a rearranged document
MIN_SEQ_LENGTH = {
    ObjectiveName.causal_lm: 1,
    ObjectiveName.prefix_lm: 1,
    ObjectiveName.fill_in_the_middle: FIM_TOKENS,  # a window of s + 1 holds them and one text token
    ObjectiveName.masked_lm: ENDS + 1,
    ObjectiveName.masked_lm_nsp: PAIR_ENDS + 2,
    ObjectiveName.span_corruption: 3,  # a token, a sentinel and the end
    ObjectiveName.bart_denoising: ENDS + 1,
    ObjectiveName.ul2: 4,  # the same after a mode token
}
"""Smallest data.seq_length that holds any text. For ul2 the decoder must have room, too."""


class SpanLengths(NamedTuple):
    window: int
    """Number of text tokens: n."""
    decoder_length: int
    """Length of the target: noise tokens, a sentinel for each span, and the end."""
    num_spans: int


class Denoiser(NamedTuple):
    """One of UL2's tasks (arXiv 2205.05131, table 1)."""

    mode: Literal["r", "s", "x"]
    mean_span_length: float
    noise_density: float


DENOISER_MODES: tuple[Literal["r", "s", "x"], ...] = ("r", "r", "s", "x", "x", "x", "x")
"""Modes of UL2's denoisers, in the order of objective.ul2_weights."""
NUM_SPAN_DENOISERS = len(DENOISER_MODES) - 1  # all but the S-denoiser


def denoisers(objective: ObjectiveConfig) -> tuple[Denoiser, ...]:
    """UL2's tasks. The S-denoiser removes one span at the end, whose share of the window is a mean."""
    spans = zip(objective.ul2_span_lengths, objective.ul2_noise_densities, strict=True)
    return tuple(
        Denoiser(mode, math.inf, objective.ul2_s_density) if mode == "s" else Denoiser(mode, *next(spans))
        for mode in DENOISER_MODES
    )


def decoder_length(objective: ObjectiveConfig, seq_length: int) -> int | None:
    """Length of the decoder; None for objectives with a single stack.

    Raises:
        ValueError: span_corruption has no room for a span.
    """
    if objective.name is ObjectiveName.span_corruption:
        return span_corruption_lengths(seq_length, objective.noise_density, objective.mean_span_length).decoder_length
    if objective.name is ObjectiveName.bart_denoising:
        return seq_length
    return ul2_decoder_length(objective, seq_length) if objective.name is ObjectiveName.ul2 else None


def ul2_decoder_length(objective: ObjectiveConfig, seq_length: int) -> int:
    """Length of the decoder, which only ul2 lets the user choose."""
    return seq_length // 2 if objective.decoder_seq_length is None else objective.decoder_seq_length


def covered_tokens(seq_length: int, infill_fraction: float) -> int:
    """Number of tokens that bart_denoising puts into masked spans."""
    return round(infill_fraction * (seq_length - ENDS))


def sentinels_needed(objective: ObjectiveConfig, seq_length: int) -> int:
    """Number of sentinels that the vocabulary must have.

    Raises:
        ValueError: the lengths have no room for a span.
    """
    if objective.name is ObjectiveName.span_corruption:
        return span_corruption_lengths(seq_length, objective.noise_density, objective.mean_span_length).num_spans
    if objective.name is ObjectiveName.ul2:
        return max(lengths.num_spans for lengths in ul2_lengths(objective, seq_length).values())
    return 0


def span_counts(window: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """Noise tokens and spans in a window of at least 2 tokens, as in T5's `random_spans_noise_mask`.

    Each span, and each piece between spans, has at least one token.
    """
    noise = min(max(round(window * noise_density), 1), window - 1)
    return noise, min(max(round(noise / mean_span_length), 1), noise, window - noise)


def span_corruption_lengths(seq_length: int, noise_density: float, mean_span_length: float) -> SpanLengths:
    """The window whose corrupted text fills the encoder exactly, so that nothing is padded.

    The encoder reads n - noise tokens, a sentinel for each span and the end; T5's `random_spans_helper` (arXiv
    1910.10683) also searches the n that fits. One more text token makes the input at most one token longer, except
    where it also allows one more span (if at least half of the text is noise): there a span is left out.

    Raises:
        ValueError: there is no such window.
    """
    if not 0 <= noise_density < 1:
        raise ValueError("must lie in [0, 1): some text has to stay")
    if seq_length < MIN_SEQ_LENGTH[ObjectiveName.span_corruption]:
        raise ValueError("has no room for a token, a sentinel and the end")

    def encoder_length(window: int) -> int:
        noise, spans = span_counts(window, noise_density, mean_span_length)
        return window - noise + spans + 1

    beyond = seq_length
    while encoder_length(beyond) <= seq_length:
        beyond *= 2
    window = bisect_right(range(2, beyond), seq_length, key=encoder_length) + 1  # the largest that fits
    surplus_span = encoder_length(window) < seq_length
    window += surplus_span
    noise, spans = span_counts(window, noise_density, mean_span_length)
    spans -= surplus_span
    return SpanLengths(window, noise + spans + 1, spans)


def ul2_lengths(objective: ObjectiveConfig, seq_length: int) -> dict[int, SpanLengths]:
    """For each index in `denoisers` with nonzero weight: as much text as fits both stacks.

    `decoder_length` is the longest target of the denoiser.

    Raises:
        ValueError: a denoiser has no room.
    """
    room = ul2_decoder_length(objective, seq_length)
    encoder_room = seq_length - objective.ul2_mode_tokens
    found = {}
    for place, (denoiser, weight) in enumerate(zip(denoisers(objective), objective.ul2_weights, strict=True)):
        if weight > 0:
            if denoiser.mode == "s":
                found[place] = _suffix_lengths(encoder_room, room, denoiser.noise_density)
            else:
                found[place] = _denoiser_lengths(encoder_room, room, denoiser)
    return found


def suffix_bounds(window: int, density: float) -> tuple[int, int]:
    """Shortest and longest suffix that the S-denoiser removes: uniform, `density` of the window on average.

    Both are in [1, window - 1], at equal distances from the mean.
    """
    mean = min(max(round(window * density), 1), window - 1)
    spread = min(mean, window - mean) - 1
    return mean - spread, mean + spread


def _denoiser_lengths(encoder_room: int, decoder_room: int, denoiser: Denoiser) -> SpanLengths:
    def lengths(window: int) -> SpanLengths:
        noise, spans = span_counts(window, denoiser.noise_density, denoiser.mean_span_length)
        return SpanLengths(window, noise + spans + 1, spans)

    def is_too_long(window: int) -> bool:
        _, target, spans = lengths(window)
        encoder = window + 2 * (spans + 1) - target  # n - noise + spans + 1
        return encoder > encoder_room or target > decoder_room

    return lengths(_largest(is_too_long, encoder_room + decoder_room))


def _suffix_lengths(encoder_room: int, decoder_room: int, density: float) -> SpanLengths:
    def is_too_long(window: int) -> bool:
        shortest, longest = suffix_bounds(window, density)
        return window - shortest + 2 > encoder_room or longest + 2 > decoder_room  # including a sentinel and the end

    window = _largest(is_too_long, encoder_room + decoder_room)
    return SpanLengths(window, suffix_bounds(window, density)[1] + 2, 1)


def _largest(is_too_long: Callable[[int], bool], beyond: int) -> int:
    """The largest window that is not too long; `is_too_long` is monotonic."""
    window = bisect_left(range(2, max(beyond, 2)), True, key=is_too_long) + 1
    if window < 2:
        raise ValueError("has no room for a token, a sentinel and the end in the encoder or the decoder")
    return window
