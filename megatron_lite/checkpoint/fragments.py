"""The parts of the model that a rank holds, and their positions in the checkpoint files.

Of each parameter and moment, a rank holds consecutive elements (ZeRO) of a slice (tensor parallelism) of the full
tensor. These elements are cut into boxes (index ranges per dimension) and intersected with the pieces of a
`StoredForm`. The results are transfers: a view of the rank's memory, and the box of a stored tensor with the same
values. Saving and loading use the same transfers, in opposite directions, so any layout can load any checkpoint.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_lite.models.stored import Box, Piece, Shape, StoredForm, whole

WEIGHT = "weight"
"""The kind of the fp32 master weights; the kind of a moment is its name in the optimizer."""


@dataclass(frozen=True)
class Region:
    """A rank's slice of a full tensor: all of it, or `local_shape[dim]` entries from `offset` along `dim`."""

    full_shape: Shape
    local_shape: Shape
    dim: int | None = None
    offset: int = 0
    """Entries beyond the full tensor's end are padding, which is not stored."""

    def clip(self, box: Box) -> Box:
        """The part of a box of the slice that is not padding, as a box of the full tensor."""
        if self.dim is None:
            return box
        size = self.full_shape[self.dim]
        start, stop = (min(end + self.offset, size) for end in box[self.dim])
        return (*box[: self.dim], (start, stop), *box[self.dim + 1 :])


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a rank's slice."""

    kind: str
    """WEIGHT, or the name of a moment."""
    name: str
    """Global name of the parameter."""
    region: Region
    start: int
    """Index of the first element in the flattened slice."""
    values: Tensor
    """[elements], fp32: the rank's own memory."""
    owned: tuple[int, int]
    """(start, stop) of the elements of `values` that this rank writes. If several ranks hold them, one writes them."""

    def of_owned(self, values: Tensor) -> Fragment:
        """A fragment of only the owned elements, stored in `values`."""
        return replace(self, start=self.start + self.owned[0], values=values, owned=(0, values.numel()))

    @property
    def owned_values(self) -> Tensor:
        return self.values[self.owned[0] : self.owned[1]]


@dataclass(frozen=True)
class Transfer:
    """A view of a rank's memory, and the box of a stored tensor that has the same values."""

    target: str
    start: Shape
    view: Tensor
    """Has the extent of the box, in the stored tensor's dimensions; may be strided."""


def share(size: int, parts: int, index: int) -> tuple[int, int]:
    """(start, stop) of the index-th of `parts` nearly equal parts."""
    return size * index // parts, size * (index + 1) // parts


def transfers(fragments: Iterable[Fragment], form: StoredForm) -> Iterator[Transfer]:
    """Every element of the fragments once, with the names and shapes of the form.

    Raises:
        KeyError: the form lacks one of the tensors.
    """
    by_source: dict[str, list[Piece]] = defaultdict(list)
    for piece in form.pieces:
        by_source[piece.source].append(piece)
    for fragment in fragments:
        if fragment.name not in by_source:
            raise KeyError(fragment.name)
        for box, view in _boxes(fragment):
            for piece in by_source[fragment.name]:
                found = _on_piece(box, view, piece, len(form.shapes[piece.target]))
                if found is not None:
                    yield found


def _boxes(fragment: Fragment) -> Iterator[tuple[Box, Tensor]]:
    """The fragment as boxes of the full tensor, each with its view of memory."""
    region = fragment.region
    taken = 0
    for local in boxes_of_range(region.local_shape, fragment.start, fragment.start + fragment.values.numel()):
        extent = [stop - start for start, stop in local]
        size = math.prod(extent)
        view = fragment.values[taken : taken + size].view(extent)
        taken += size
        box = region.clip(local)
        valid = [stop - start for start, stop in box]
        if math.prod(valid):
            yield box, view if region.dim is None else view.narrow(region.dim, 0, valid[region.dim])


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The elements [start, stop) of a tensor in memory order, as boxes, in the same order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start, stop),) if shape else ()
        return
    row_size = math.prod(shape[1:])
    (first, begin), (last, end) = divmod(start, row_size), divmod(stop, row_size)
    if first == last:
        yield from _in_row(first, boxes_of_range(shape[1:], begin, end))
        return
    if begin:
        yield from _in_row(first, boxes_of_range(shape[1:], begin, row_size))
        first += 1
    if first < last:
        yield ((first, last), *whole(tuple(shape[1:])))
    yield from _in_row(last, boxes_of_range(shape[1:], 0, end))


def _in_row(row: int, boxes: Iterator[Box]) -> Iterator[Box]:
    return (((row, row + 1), *box) for box in boxes)


def _on_piece(box: Box, view: Tensor, piece: Piece, stored_dims: int) -> Transfer | None:
    """The intersection of a box of our full tensor with a piece, as a transfer; None if it is empty."""
    common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, piece.box, strict=True)]
    if any(start >= stop for start, stop in common):
        return None
    for dim, ((start, stop), (origin, _)) in enumerate(zip(common, box, strict=True)):
        view = view.narrow(dim, start - origin, stop - start)
    shifts = [start - origin for (start, _), (origin, _) in zip(common, piece.box, strict=True)]
    while view.dim() > stored_dims:
        view, shifts = view.squeeze(0), shifts[1:]
    if piece.transposed:
        view, shifts = view.transpose(-1, -2), [*shifts[:-2], shifts[-1], shifts[-2]]
    return Transfer(piece.target, tuple(a + b for a, b in zip(piece.start, shifts, strict=True)), view)
