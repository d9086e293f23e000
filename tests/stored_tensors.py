"""Whole tensors through a stored form and back, in one process."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_lite.models.stored import Piece, Shape, StoredForm


def to_stored(full: Mapping[str, Tensor], form: StoredForm) -> dict[str, Tensor]:
    """Our full, unpadded tensors as the tensors of the files. What no piece covers is zero."""
    like = next(iter(full.values()))
    stored = {name: like.new_zeros(shape) for name, shape in form.shapes.items()}
    for piece in form.pieces:
        _in_stored(stored[piece.target], piece).copy_(_in_full(full[piece.source], piece))
    return stored


def from_stored(stored: Mapping[str, Tensor], form: StoredForm, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Tensors of the files, under the names of the form, as our full, unpadded ones of these shapes."""
    like = next(iter(stored.values()))
    full = {name: like.new_zeros(shape) for name, shape in shapes.items()}
    for piece in form.pieces:
        _in_full(full[piece.source], piece).copy_(_in_stored(stored[piece.target], piece))
    return full


def _in_full(tensor: Tensor, piece: Piece) -> Tensor:
    """The piece's box, as it lies in the file."""
    part = tensor[tuple(slice(start, stop) for start, stop in piece.box)]
    for _ in range(part.ndim - len(piece.start)):
        part = part[0]  # a view, which may be written to
    return part.transpose(-1, -2) if piece.transposed else part


def _in_stored(tensor: Tensor, piece: Piece) -> Tensor:
    extents = [stop - start for start, stop in piece.box][-len(piece.start) :]
    if piece.transposed:
        extents[-2:] = reversed(extents[-2:])
    return tensor[tuple(slice(start, start + extent) for start, extent in zip(piece.start, extents, strict=True))]
