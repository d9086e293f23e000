"""What an objective is: a pure function from a piece of text and a key to what the model reads and predicts.

Shapes: s positions of the encoder or only stack, d positions whose labels are predicted (the decoder's, or s).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from megatron_lite.data.samples.sample_types import Example, Ids, PairShape, SentencePair, Text, WindowShape
from megatron_lite.models.fields import Field

__all__ = ["Example", "Ids", "Objective", "PairShape", "SentencePair", "Text", "WindowShape"]


class Objective(ABC):
    """Built once for a run by `objectives.build.build_objective`."""

    inputs: tuple[Field, ...]
    """What the model reads: fields of `models.activations.Activations`, in the order of `Example.inputs`."""
    label_length: int
    """d: positions whose labels are predicted."""
    shape: WindowShape | PairShape
    """What it is fed with: `Text` for windows, `SentencePair` for pairs."""
    has_sequence_label: ClassVar[bool] = False

    @abstractmethod
    def example(self, text: Any, key: int) -> Example:
        """The sample that this text becomes.

        Args:
            text: `Text` or `SentencePair`, see `shape`.
            key: of all random choices: `stream_key(seed, global sample index)`. Equal keys give equal samples.
        """
