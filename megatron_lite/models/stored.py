"""How tensors are stored in files: our tensors are cut into boxes, each with its place in a tensor of a file.

A checkpoint stores the weights with the names and shapes of transformers (`models.hf`), and the optimizer's moments
with our own. Both are described by a list of boxes. Elements that no box covers are zero.
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
    """stored[start : start + extent] == full[box], transposed if `transposed`.

    A stored tensor may have fewer dimensions than ours: leading dimensions in which the box has one entry are dropped.
    """

    source: str
    """Global name of the full, unpadded tensor."""
    box: Box
    """Its range in the full tensor."""
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
    """The form of tensors that are stored with our own names and shapes."""
    return StoredForm(
        dict(shapes),
        tuple(Piece(name, whole(shape), name, (0,) * len(shape)) for name, shape in shapes.items()),
    )
