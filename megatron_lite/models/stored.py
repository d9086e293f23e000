"""How tensors lie in files: ours cut into boxes, each box at its place in a tensor of a file.

A checkpoint keeps the weights under the names and in the shapes of transformers (`models.hf`), and the optimizer's
moments under our own. Both are the same thing here: a list of boxes. What no box covers is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

Shape: TypeAlias = tuple[int, ...]
Box: TypeAlias = tuple[tuple[int, int], ...]
"""(start, stop) along each dimension."""


@dataclass(frozen=True)
class Piece:
    """stored[start : start + extent] == full[box], transposed where it says so.

    A stored tensor may have fewer dimensions than ours: leading ones, of which the box holds one entry, are dropped.
    """

    source: str
    """Global name of the full, unpadded tensor."""
    box: Box
    """Of the full tensor."""
    target: str
    """Name in the file."""
    start: Shape
    """Where the box begins in the stored tensor."""
    transposed: bool = False
    """The last two dimensions are swapped in the file."""


@dataclass(frozen=True)
class StoredForm:
    """Every tensor of a set of files, and where its content comes from."""

    shapes: Mapping[str, Shape]
    """By name in the file, in the order of the files."""
    pieces: tuple[Piece, ...]


def whole(shape: Shape) -> Box:
    return tuple((0, size) for size in shape)


def same_names(shapes: Mapping[str, Shape]) -> StoredForm:
    """Tensors that lie in the files as we name and shape them."""
    return StoredForm(
        dict(shapes),
        tuple(Piece(name, whole(shape), name, (0,) * len(shape)) for name, shape in shapes.items()),
    )
