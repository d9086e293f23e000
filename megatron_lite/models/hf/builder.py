"""Building blocks for the stored form of a family.

Shapes: h hidden, n attention heads, g query groups, d head size, f inner channels of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.models.stored import Piece, Shape, StoredForm, whole


class FormBuilder:
    """Collects stored tensors and their pieces, in the order in which they are added.

    Methods that take a module map its weight and, where our module has one, its bias.
    """

    def __init__(self, model: ResolvedModel, shapes: Mapping[str, Shape]) -> None:
        """
        Args:
            shapes: full, unpadded shapes of all our parameters, by global name.
        """
        self.model = model
        self.shapes = shapes
        self._stored: dict[str, Shape] = {}
        self._pieces: list[Piece] = []

    def form(self) -> StoredForm:
        return StoredForm(self._stored, tuple(self._pieces))

    def zeros(self, target: str, shape: Shape) -> None:
        """A tensor that transformers needs and we do not have; stored as zeros."""
        self._stored[target] = shape

    def tensor(self, source: str, target: str, *, transposed: bool = False) -> None:
        """Map one whole tensor."""
        shape = self.shapes[source]
        self._stored[target] = _swapped(shape) if transposed else shape
        self._pieces.append(Piece(source, whole(shape), target, (0,) * len(shape), transposed))

    def module(self, source: str, target: str, *, transposed: bool = False) -> None:
        """Map weight and bias; `transposed` applies to the weight."""
        for kind in self._kinds(source):
            self.tensor(source + kind, target + kind, transposed=transposed and kind == ".weight")

    def stacked(self, source: str, targets: Sequence[str]) -> None:
        """[k, ...] -> k modules of [...]."""
        for kind in self._kinds(source):
            shape = self.shapes[source + kind][1:]
            for index, target in enumerate(targets):
                self._stored[target + kind] = shape
                box = ((index, index + 1), *whole(shape))
                self._pieces.append(Piece(source + kind, box, target + kind, (0,) * len(shape)))

    def split_qkv(self, source: str, targets: tuple[str, str, str]) -> None:
        """[g (n/g + 2) d, h], ordered as `models.attention` reads it -> query [n d, h], key and value [g d, h]."""
        for kind in self._kinds(source):
            rest = self.shapes[source + kind][1:]
            for target, heads in zip(targets, self._heads(), strict=True):
                self._stored[target + kind] = (heads * self._head_size, *rest)
            for part, rows, row in self._qkv_runs():
                target = targets[part] + kind
                self._pieces.append(Piece(source + kind, (rows, *whole(rest)), target, (row, *(0 for _ in rest))))

    def joined_qkv(self, source: str, target: str) -> None:
        """The same input -> [h, 3 h]: transposed query, key and value side by side; the bias becomes [3 h]."""
        thirds = [0, self.model.hidden_size, 2 * self.model.hidden_size]
        weight, bias = source + ".weight", source + ".bias"
        hidden = whole(self.shapes[weight][1:])
        self._stored[target + ".weight"] = _swapped(self.shapes[weight])
        self._stored[target + ".bias"] = self.shapes[bias]
        for part, rows, row in self._qkv_runs():
            place = thirds[part] + row
            self._pieces.append(Piece(weight, (rows, *hidden), target + ".weight", (0, place), transposed=True))
            self._pieces.append(Piece(bias, (rows,), target + ".bias", (place,)))

    def _kinds(self, source: str) -> list[str]:
        return [kind for kind in (".weight", ".bias") if source + kind in self.shapes]

    @property
    def _head_size(self) -> int:
        return self.model.head_size

    def _heads(self) -> tuple[int, int, int]:
        """Number of heads of query, key and value."""
        return self.model.num_attention_heads, self.model.num_query_groups, self.model.num_query_groups

    def _qkv_runs(self) -> Iterator[tuple[int, tuple[int, int], int]]:
        """(0 query, 1 key or 2 value; rows of the fused tensor; first row within the separate tensor)."""
        heads, groups, _ = self._heads()
        start = 0
        for group in range(groups):
            for part, count in enumerate((heads // groups, 1, 1)):
                stop = start + count * self._head_size
                yield part, (start, stop), group * (stop - start)
                start = stop


def _swapped(shape: Shape) -> Shape:
    return (*shape[:-2], shape[-1], shape[-2])
