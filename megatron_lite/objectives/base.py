"""The interface of an objective: a pure function from a text and a key to the model's inputs and labels.

Shapes: s positions of the encoder or the only stack, d positions whose labels are predicted (the decoder's, or s).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from megatron_lite.data.samples.sample_types import Example, Ids, PairShape, SentencePair, Text, WindowShape
from megatron_lite.models.fields import Field

__all__ = ["Example", "Ids", "Objective", "PairShape", "SentencePair", "Text", "WindowShape"]


class Objective(ABC):
    """A training objective; `objectives.build.build_objective` builds it once per run."""

    inputs: tuple[Field, ...]
    """The model's inputs: fields of `models.activations.Activations`, in the order of `Example.inputs`."""
    label_length: int
    """d: positions whose labels are predicted."""
    shape: WindowShape | PairShape
    """What it is built from: `Text` for windows, `SentencePair` for pairs."""
    has_sequence_label: ClassVar[bool] = False

    @abstractmethod
    def example(self, text: Any, key: int) -> Example:
        """Make a training sample from a text.

        Args:
            text: `Text` or `SentencePair`, see `shape`.
            key: determines all random choices: `stream_key(seed, global sample index)`. Equal keys give equal samples,
                on every rank and after every resume.
        """
