"""The inverse of each objective: what the model reads and predicts, put together, is the text again."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron_lite.objectives.base import Example
from tests.unit.objectives.samples import (
    CLS,
    EOD,
    FIM_MIDDLE,
    FIM_PREFIX,
    FIM_SUFFIX,
    MODE_R,
    MODE_X,
    PAD,
    SENTINELS,
    SEP,
)

Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def next_token(example: Example) -> list[int]:
    """causal_lm and prefix_lm: the input and the last label."""
    tokens, labels = example.inputs[0], example.labels
    assert np.array_equal(tokens[1:], labels[:-1])
    return [*tokens.tolist(), int(labels[-1])]


def masked(example: Example) -> list[int]:
    """masked_lm and masked_lm_nsp: labels where there is a weight, else the input."""
    return np.where(example.loss_weights > 0, example.labels, example.inputs[0]).tolist()


def spans(tokens: Ids, labels: Ids) -> Ids:
    """span_corruption and ul2: every sentinel of the input gives way to what follows it in the target.

    Of many samples at once: [n, s] and [n, d] -> [n, s + d], with padding behind each text.
    """
    (pieces, is_kept), (spans, is_taken) = _between_sentinels(tokens), _between_sentinels(labels)
    assert np.array_equal(pieces[:, -1], spans[:, -1])
    assert (labels[:, 0] == SENTINELS[0]).all()
    assert is_taken[:, 1:][_is_sentinel(labels)[:, :-1]].all()  # no span is empty
    both, places = np.hstack([tokens, labels]), np.hstack([2 * pieces, 2 * spans - 1])
    return _arranged(both, places, np.hstack([is_kept, is_taken]))


def _between_sentinels(part: Ids) -> tuple[Ids, Flags]:
    """Of an input or a target [n, m]: the sentinels up to each place, and which tokens are of the text."""
    is_sentinel = _is_sentinel(part)
    count = np.cumsum(is_sentinel, axis=1)
    assert np.array_equal(part[is_sentinel], SENTINELS[0] - 1 + count[is_sentinel])
    end = (part != PAD).sum(1, keepdims=True) - 1
    assert (np.take_along_axis(part, end, axis=1) == EOD).all()
    is_mode = (part >= MODE_R) & (part <= MODE_X)
    return count, (np.arange(part.shape[1]) < end) & ~is_sentinel & ~is_mode


def _is_sentinel(part: Ids) -> Flags:
    return (part >= SENTINELS[0]) & (part <= SENTINELS[-1])


def _arranged(tokens: Ids, places: Ids, stays: Flags) -> Ids:
    """[n, m]: each row's tokens that stay, by their places and where these are equal as before; then padding."""
    order = np.argsort(np.where(stays, places, np.iinfo(np.int16).max).astype(np.int16), axis=1, kind="stable")
    return np.take_along_axis(np.where(stays, tokens, PAD), order, axis=1)


def unpadded(example: Example) -> tuple[Ids, Ids]:
    """The used parts of the encoder's input and of the labels, of objectives that pad; checks the rest."""
    tokens, length, decoder_tokens = example.inputs
    predicted = int(example.loss_weights.sum())
    assert (example.loss_weights[:predicted] == 1).all()
    for array, used in ((tokens, length), (example.labels, predicted), (decoder_tokens, predicted)):
        assert (array[used:] == PAD).all()
    assert np.array_equal(decoder_tokens[1:predicted], example.labels[: predicted - 1])
    return tokens[:length], example.labels[:predicted]


def denoised(example: Example) -> list[int]:
    """bart_denoising: the target is the text."""
    text = unpadded(example)[1].tolist()
    assert (text[0], text[-1]) == (CLS, SEP)
    return text[1:-1]


def in_order(window: list[int]) -> list[int]:
    """fill_in_the_middle: every document of a rearranged window with its parts where they were."""
    result: list[int] = []
    begin = 0
    while begin < len(window):
        end = next((place for place in range(begin, len(window)) if window[place] == EOD), len(window))
        result += _document_in_order(window[begin:end]) + window[end : end + 1]
        begin = end + 1
    return result


def _document_in_order(tokens: list[int]) -> list[int]:
    if not tokens or tokens[0] != FIM_PREFIX:
        return tokens
    at_suffix, at_middle = tokens.index(FIM_SUFFIX), tokens.index(FIM_MIDDLE)
    prefix, suffix, behind = tokens[1:at_suffix], tokens[at_suffix + 1 : at_middle], tokens[at_middle + 1 :]
    return prefix + behind + suffix  # of SPM `prefix` is empty, and `behind` holds prefix and middle


def one_document(windows: Ids) -> Ids:
    """fill_in_the_middle: windows [n, s + 1] of one rearranged document each, with its parts where they were."""
    at_suffix, at_middle = (np.argmax(windows == token, axis=1)[:, None] for token in (FIM_SUFFIX, FIM_MIDDLE))
    at = np.arange(windows.shape[1])
    places = np.select([at < at_suffix, at > at_middle], [0, 1], 2)  # prefix, middle (in SPM both behind), suffix
    return _arranged(windows, places, (windows < FIM_PREFIX) | (windows > FIM_MIDDLE))
