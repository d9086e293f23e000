"""From a family's table of tensors to the stored form of one model: each box of our parameters with its place.

Shapes: h hidden, n attention heads, g query groups, d head size, f inner channels of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from megatron_lite.config.hf.family import Family
from megatron_lite.config.hf.tensors import Layout, Place, Tensors
from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.models.stored import Piece, Shape, StoredForm, whole


def build_form(family: Family, model: ResolvedModel, shapes: Mapping[str, Shape]) -> StoredForm:
    """
    Args:
        shapes: full, unpadded shapes of all our parameters, by global name.
    """
    builder = _Builder(model, shapes)
    for source, place in _of_all_layers(family.tensors, model):
        builder.add(source, place)
    vocab_size = shapes["embedding.weight"][0]
    for target, sizes in family.zeros.items():
        builder.zeros(target, tuple(vocab_size if size == "vocab_size" else int(size) for size in sizes))
    return builder.form()


def _of_all_layers(tensors: Tensors, model: ResolvedModel) -> Iterator[tuple[str, Place]]:
    """The table with one entry for each layer: `layers.*.mlp` becomes `layers.0.mlp`, ..., layer by layer."""
    done = set()
    for source, place in tensors.items():
        stack, star, _ = source.partition("*")
        if not star:
            yield source, place
        elif stack not in done:
            done.add(stack)
            layer = [(name, entry) for name, entry in tensors.items() if name.startswith(f"{stack}*")]
            for index in range(model.decoder_layers if stack.startswith("decoder.") else model.num_layers):
                for name, entry in layer:
                    names = tuple(target.replace("*", str(index)) for target in entry.names)
                    yield name.replace("*", str(index)), replace(entry, names=names)


class _Builder:
    """Collects stored tensors and their pieces, in the order in which they are added."""

    def __init__(self, model: ResolvedModel, shapes: Mapping[str, Shape]) -> None:
        self.model = model
        self.shapes = shapes
        self._stored: dict[str, Shape] = {}
        self._pieces: list[Piece] = []

    def form(self) -> StoredForm:
        return StoredForm(self._stored, tuple(self._pieces))

    def add(self, source: str, place: Place) -> None:
        """Map the weight of a module and, where our module has one, its bias; nothing if we have no such module."""
        if place.layout is Layout.tied_or_untied:
            self._head_bias(source, *place.names)
            return
        for kind in (".weight", ".bias"):
            if source + kind not in self.shapes:
                continue
            targets = [name + kind for name in place.names]
            match place.layout:
                case Layout.same:
                    self._tensor(source + kind, targets[0])
                case Layout.transposed:
                    self._tensor(source + kind, targets[0], transposed=kind == ".weight")
                case Layout.stacked:
                    self._stacked(source + kind, targets)
                case Layout.split_qkv:
                    self._split_qkv(source + kind, targets)
                case Layout.joined_qkv:
                    self._joined_qkv(source + kind, targets[0], transposed=kind == ".weight")

    def zeros(self, target: str, shape: Shape) -> None:
        """A tensor that transformers needs and we do not have; stored as zeros."""
        self._stored[target] = shape

    def _tensor(self, source: str, target: str, *, transposed: bool = False) -> None:
        shape = self.shapes[source]
        self._stored[target] = _swapped(shape) if transposed else shape
        self._pieces.append(Piece(source, whole(shape), target, (0,) * len(shape), transposed))

    def _stacked(self, source: str, targets: Sequence[str]) -> None:
        """[k, ...] -> k tensors of [...]."""
        shape = self.shapes[source][1:]
        for index, target in enumerate(targets):
            self._stored[target] = shape
            self._pieces.append(Piece(source, ((index, index + 1), *whole(shape)), target, (0,) * len(shape)))

    def _split_qkv(self, source: str, targets: Sequence[str]) -> None:
        """[g (n/g + 2) d, h], ordered as `models.attention` reads it -> query [n d, h], key and value [g d, h]."""
        rest = self.shapes[source][1:]
        heads, groups = self.model.num_attention_heads, self.model.num_query_groups
        for target, count in zip(targets, (heads, groups, groups), strict=True):
            self._stored[target] = (count * self.model.head_size, *rest)
        for part, rows, row in self._qkv_runs():
            self._pieces.append(Piece(source, (rows, *whole(rest)), targets[part], (row, *(0 for _ in rest))))

    def _joined_qkv(self, source: str, target: str, *, transposed: bool) -> None:
        """The same weight -> [h, 3 h]: transposed query, key and value side by side; the bias becomes [3 h]."""
        thirds = [0, self.model.hidden_size, 2 * self.model.hidden_size]
        rest = self.shapes[source][1:]
        self._stored[target] = _swapped(self.shapes[source]) if transposed else self.shapes[source]
        for part, rows, row in self._qkv_runs():
            start = (*(0 for _ in rest), thirds[part] + row)
            self._pieces.append(Piece(source, (rows, *whole(rest)), target, start, transposed))

    def _head_bias(self, source: str, tied: str, untied: str) -> None:
        bias = f"{source}.bias"
        if bias not in self.shapes:
            return
        if "head.weight" in self.shapes:
            self.zeros(f"{tied}.bias", self.shapes[bias])
            self._tensor(bias, f"{untied}.bias")
        else:
            self._tensor(bias, f"{tied}.bias")

    def _qkv_runs(self) -> Iterator[tuple[int, tuple[int, int], int]]:
        """(0 query, 1 key or 2 value; rows of the fused tensor; first row within the separate tensor)."""
        heads, groups = self.model.num_attention_heads, self.model.num_query_groups
        start = 0
        for group in range(groups):
            for part, count in enumerate((heads // groups, 1, 1)):
                stop = start + count * self.model.head_size
                yield part, (start, stop), group * (stop - start)
                start = stop


def _swapped(shape: Shape) -> Shape:
    return (*shape[:-2], shape[-1], shape[-2])
