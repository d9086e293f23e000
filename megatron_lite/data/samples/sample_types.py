"""The types between datasets and objectives: windows of text, pairs of sentences, and the examples made of them.

Shapes: d positions whose labels are predicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class Text(NamedTuple):
    """A window of a corpus: concatenated documents, with an end-of-document token after each that ends here."""

    tokens: Ids  # [window]
    sentence_starts: Ids | None = None
    """Ascending positions in `tokens` where a sentence or a document begins, including 0; None for objectives that do
    not need sentences."""


class SentencePair(NamedTuple):
    """Two parts, each of whole sentences."""

    first: Ids  # [any length]
    second: Ids  # [any length]
    is_next: bool
    """Whether the second follows the first in its document, rather than being drawn from another one."""


class Example(NamedTuple):
    """One sample as the model reads it. All arrays of an objective have fixed shapes."""

    inputs: tuple[npt.NDArray[np.int64] | int, ...]
    """In the order of `Objective.inputs`: an array [length], or a number for a field without a length."""
    labels: Ids  # [d]
    loss_weights: npt.NDArray[np.float32]  # [d]: 0 where the prediction does not count
    sequence_label: int | None = None
    """Class of the whole sample: 0 = the second part follows the first, 1 = it does not; None = no class."""


@dataclass(frozen=True)
class WindowShape:
    """Samples are windows of the stream of documents."""

    tokens: int
    """Length of a window."""
    stride: int
    """Distance between the starts of neighbouring windows."""
    sentences: bool = False
    """Whether the objective needs `Text.sentence_starts`."""


@dataclass(frozen=True)
class PairShape:
    """Samples are pairs of parts of whole sentences."""

    tokens: int
    """Largest total length of both parts."""
    next_fraction: float
    short_fraction: float
