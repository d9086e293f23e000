"""How a family of transformers names and lays out the tensors of a model: tables, which `models.hf` turns into boxes.

A table maps modules of ours to places in files. `*` stands for the index of a layer: {"layers.*.mlp.down":
module("model.layers.*.mlp.down_proj")}. A place holds the weight and, where our module has one, the bias. A module that
a model does not have (a gated MLP, a head of its own) may be in the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum, auto


class Layout(StrEnum):
    """Shapes: h hidden, n attention heads, g query groups, d head size, f inner channels of the MLP."""

    same = auto()  # the same shape
    transposed = auto()  # the weight is [in, out]
    stacked = auto()  # our [k, ...] is k modules
    split_qkv = auto()  # our [g (n/g + 2) d, h], ordered by query group, is query [n d, h], key and value [g d, h]
    joined_qkv = auto()  # the same weight is [h, 3 h]: query, key and value side by side
    tied_or_untied = auto()  # a bias on the logits whose name depends on whether the head is tied


@dataclass(frozen=True)
class Place:
    """Where one module of ours is in the files."""

    layout: Layout
    names: tuple[str, ...]
    """Modules of transformers."""


Tensors = Mapping[str, Place]


def module(name: str) -> Place:
    return Place(Layout.same, (name,))


def transposed(name: str) -> Place:
    return Place(Layout.transposed, (name,))


def stacked(*names: str) -> Place:
    return Place(Layout.stacked, names)


def split_qkv(query: str, key: str, value: str) -> Place:
    return Place(Layout.split_qkv, (query, key, value))


def joined_qkv(name: str) -> Place:
    return Place(Layout.joined_qkv, (name,))


def tied_or_untied(tied: str, untied: str) -> Place:
    return Place(Layout.tied_or_untied, (tied, untied))


def inside(ours: str, theirs: str, places: Mapping[str, Place]) -> dict[str, Place]:
    """The places of parts of a module, such as a layer.

    Args:
        ours, theirs: name of the module: `layers.*`, and `model.layers.*`.
    """
    return {
        f"{ours}.{part}": replace(place, names=tuple(f"{theirs}.{name}" for name in place.names))
        for part, place in places.items()
    }
