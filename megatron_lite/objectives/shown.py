"""Show a sample after its objective as readable text, to compare with the original. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_lite.objectives.base import Example, Ids, Objective

Decode = Callable[[Ids], str]


@dataclass(frozen=True)
class Predicted:
    """Consecutive positions whose labels count in the loss."""

    position: int
    """The first position."""
    text: str


@dataclass(frozen=True)
class Shown:
    """A sample as text. Parts that an objective does not have are empty or None."""

    reads: dict[str, str | int]
    """By input field: for `tokens` and `decoder_tokens` the text without padding, with special tokens by name; for
    `lengths` and `prefix_lengths` the number; for `segments` the position where the second part begins."""
    predicts: list[Predicted]
    predicted: int
    """Number of positions whose labels count in the loss."""
    positions: int
    """Number of all label positions."""
    is_next: bool | None
    """For pairs: whether the second part follows the first in its document."""

    def lines(self) -> list[str]:
        """Lines for a terminal."""
        lines = [f"reads {name}: {on_one_line(str(value))}" for name, value in self.reads.items()]
        runs = " | ".join(f"{run.position}: {run.text}" for run in self.predicts)
        lines.append(f"predicts {self.predicted} of {self.positions} positions: {on_one_line(runs)}")
        if self.is_next is not None:
            lines.append(f"predicts that the second part {'follows' if self.is_next else 'does not follow'} the first")
        return lines


def show(objective: Objective, example: Example, decode: Decode) -> Shown:
    """
    Args:
        example: a sample of this objective.
        decode: converts tokens to text.
    """
    inputs = dict(zip((field.name for field in objective.inputs), example.inputs, strict=True))
    counted = np.flatnonzero(example.loss_weights)
    length = inputs.get("lengths")
    ends = {"tokens": length, "decoder_tokens": int(counted[-1]) + 1 if len(counted) else 0}
    reads: dict[str, str | int] = {}
    for name, value in inputs.items():
        if isinstance(value, int):
            reads[name] = value
        else:
            reads[name] = int(value.argmax()) if name == "segments" else decode(value[: ends[name]])
    bounds = [0, *(np.flatnonzero(np.diff(counted) > 1) + 1).tolist(), len(counted)]
    runs = [counted[first:last] for first, last in pairwise(bounds)] if len(counted) else []
    return Shown(
        reads,
        [Predicted(int(run[0]), decode(example.labels[run])) for run in runs],
        len(counted),
        len(example.labels),
        None if example.sequence_label is None else example.sequence_label == 0,
    )


def on_one_line(text: str) -> str:
    """Escape line ends as `\\n`, so that a text stays on one line."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
