"""Descriptions of the tensors in a sample, shared by objectives and models. Imports no torch, so that an objective's
output can be inspected without it."""

from __future__ import annotations

from typing import NamedTuple


class Field(NamedTuple):
    """A tensor of `Activations` that a layer takes from earlier layers, or from the batch."""

    name: str
    length: int | None = None
    """Positions per sample (a hidden state has h channels for each); None = one number per sample."""
