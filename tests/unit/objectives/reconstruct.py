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


def next_token(example: Example) -> list[int]:
    """causal_lm and prefix_lm: the input and the last label."""
    tokens, labels = example.inputs[0], example.labels
    assert np.array_equal(tokens[1:], labels[:-1])
    return [*tokens.tolist(), int(labels[-1])]


def masked(example: Example) -> list[int]:
    """masked_lm and masked_lm_nsp: labels where there is a weight, else the input."""
    return np.where(example.loss_weights > 0, example.labels, example.inputs[0]).tolist()


def spans(tokens: Ids, labels: Ids) -> list[int]:
    """span_corruption and ul2: every sentinel of the input gives way to what follows it in the target."""
    read, target = tokens.tolist(), labels.tolist()
    if MODE_R <= read[0] <= MODE_X:
        read = read[1:]
    assert read.pop() == EOD
    assert target.pop() == EOD
    pieces: dict[int, list[int]] = {}
    for token in target:
        if token in SENTINELS:
            assert token not in pieces
            current = pieces[token] = []
        else:
            current.append(token)
    assert all(pieces.values())
    assert [token for token in read if token in SENTINELS] == list(pieces) == list(SENTINELS[: len(pieces)])
    return [token for place in read for token in pieces.get(place, [place])]


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
