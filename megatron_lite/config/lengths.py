"""How many positions the two stacks of an encoder-decoder have, and how much text fills them.

Lengths are fixed for a run, as a pipeline needs: none depends on a sample.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import partial
from typing import NamedTuple

from megatron_lite.config.schema import ObjectiveName, RunConfig

SPAN_CORRUPTION_MIN_LENGTH = 3  # a kept token, the sentinel of a span, the end-of-document token


class SpanLengths(NamedTuple):
    """What span corruption makes of a window of text."""

    window: int
    """Tokens of the raw text."""
    decoder_length: int
    """Tokens taken out, a sentinel ahead of each span, and the end-of-document token."""
    num_spans: int


def span_corruption_lengths(seq_length: int, noise_density: float, mean_span_length: float) -> SpanLengths:
    """The longest window whose corrupted form has exactly `seq_length` tokens (the code of arXiv
    1910.10683).

    With noise = round(window x density) and spans = round(noise / mean), at least 1 each:
    encoder = window - noise + spans + 1, decoder = noise + spans + 1; the 1 is the end-of-document token.

    A token more in the window adds 0 or 1 to the encoder's length as long as mean_span_length >= 1, so every length is
    met; of several windows the longest wastes no text.

    Args:
        seq_length: of the encoder, SPAN_CORRUPTION_MIN_LENGTH or more.
        noise_density: inside (0, 1).
        mean_span_length: tokens, 1 or more.
    """
    length = partial(_encoder_length, noise_density=noise_density, mean_span_length=mean_span_length)
    above = 4
    while length(above) <= seq_length:
        above *= 2
    window = bisect_right(range(above), seq_length, lo=2, key=length) - 1
    noise, spans = _noise_and_spans(window, noise_density, mean_span_length)
    return SpanLengths(window, noise + spans + 1, spans)


def _encoder_length(window: int, noise_density: float, mean_span_length: float) -> int:
    noise, spans = _noise_and_spans(window, noise_density, mean_span_length)
    return window - noise + spans + 1


def _noise_and_spans(window: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    noise = min(max(round(window * noise_density), 1), window - 1)
    return noise, max(round(noise / mean_span_length), 1)


def decoder_length(config: RunConfig) -> int | None:
    """Positions of the decoder; None where the objective feeds a single stack."""
    objective, length = config.objective, config.data.seq_length
    if objective.name is ObjectiveName.span_corruption:
        return span_corruption_lengths(length, objective.noise_density, objective.mean_span_length).decoder_length
    if objective.name is ObjectiveName.bart_denoising:
        return length
    if objective.name is ObjectiveName.ul2:
        return objective.decoder_seq_length or length // 2
    return None
