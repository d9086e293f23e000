"""The words in which objectives and models agree on what a sample is made of. Needs no torch, so that what an
objective makes of a text can be looked at without it."""

from __future__ import annotations

from typing import NamedTuple


class Field(NamedTuple):
    """A tensor of `Activations` that a layer takes from those before it, or from the batch."""

    name: str
    length: int | None = None
    """Positions of a sample (a hidden state has h channels for each); None = one number a sample."""
