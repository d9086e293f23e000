"""What datasets give and objectives take: windows of text, pairs of sentences, and what they become.

Shapes: d positions whose labels are predicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class Text(NamedTuple):
    """A window of a corpus: documents one after another, an end-of-document token behind each that ends here."""

    tokens: Ids  # [window]
    sentence_starts: Ids | None = None
    """Ascending places in `tokens` where a sentence or a document begins, 0 included; for objectives that ask for
    sentences, else None."""


class SentencePair(NamedTuple):
    """Two runs of whole sentences."""

    first: Ids  # [any length]
    second: Ids  # [any length]
    is_next: bool
    """Whether the second follows the first in its document, rather than being drawn from another one."""


class Example(NamedTuple):
    """One sample as the model sees it. All arrays of an objective have fixed shapes."""

    inputs: tuple[npt.NDArray[np.int64] | int, ...]
    """In the order of `Objective.inputs`: an array [length], or a number where the field has no length."""
    labels: Ids  # [d]
    loss_weights: npt.NDArray[np.float32]  # [d]: 0 where the prediction does not count
    sequence_label: int | None = None
    """Class of the whole sample, where there is one: 0 = the second part follows the first, 1 = it does not."""


@dataclass(frozen=True)
class WindowShape:
    """Which pieces of the stream of documents are samples."""

    tokens: int
    """Length of a window."""
    stride: int
    """Distance of the starts of neighbouring windows."""
    sentences: bool = False
    """Whether `Text.sentence_starts` is wanted."""


@dataclass(frozen=True)
class PairShape:
    """Samples are pairs of runs of sentences."""

    tokens: int
    """Largest length of both together."""
    next_fraction: float
    short_fraction: float
