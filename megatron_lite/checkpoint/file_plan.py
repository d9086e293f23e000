"""The tensors of a checkpoint and their files: the same on every rank and for every layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_lite.checkpoint.fragments import WEIGHT
from megatron_lite.checkpoint.state import TRAINING
from megatron_lite.checkpoint.tensor_files import LARGEST_FILE_BYTES, TensorFile, index_of, split_into_files
from megatron_lite.models.stored import Shape, StoredForm, same_names

Shapes = Mapping[str, Mapping[str, Shape]]
"""Shapes of full, unpadded tensors: by kind (the weights, each moment), then by global name."""


@dataclass(frozen=True)
class TensorSet:
    """All tensors of one kind."""

    form: StoredForm
    files: Sequence[TensorFile]


@dataclass(frozen=True)
class FilePlan:
    """The tensor files of a checkpoint, by kind of tensor."""

    sets: Mapping[str, TensorSet]
    hugging_face: bool
    """Whether the weights have transformers' names and shapes."""

    @classmethod
    def of(
        cls,
        shapes: Shapes,
        weights_form: Callable[[Mapping[str, Shape]], StoredForm] | None,
        largest_bytes: int = LARGEST_FILE_BYTES,
    ) -> FilePlan:
        """
        Args:
            shapes: shapes of the whole model, see `shapes_of_all_ranks`.
            weights_form: how the weights are stored; None = with our own names and shapes, as moments always are.
        """
        sets = {}
        for kind, own in shapes.items():
            form = weights_form(own) if weights_form and kind == WEIGHT else same_names(own)
            sets[kind] = TensorSet(form, split_into_files(stem_of(kind), form, largest_bytes))
        return cls(sets, weights_form is not None)

    @property
    def files(self) -> list[TensorFile]:
        return [file for one in self.sets.values() for file in one.files]

    @property
    def bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def index(self) -> str | None:
        """The index.json of the weights' files; None if there is only one file."""
        return index_of(self.sets[WEIGHT].files)


def stem_of(kind: str) -> str:
    """The beginning of the file names of a kind."""
    return "model" if kind == WEIGHT else f"{TRAINING}/{kind}"


def files_of(kind: str, names: Iterable[str]) -> list[str]:
    """The files of a kind, among the names in a checkpoint's manifest. Other files in the folder are not part of the
    checkpoint, whatever their names."""
    pattern = re.compile(rf"{re.escape(stem_of(kind))}(-\d+-of-\d+)?\.safetensors")
    return sorted(name for name in names if pattern.fullmatch(name))


def shapes_of_all_ranks(own: Shapes) -> Shapes:
    """The shapes of the whole model, gathered from all ranks; their order is the same for every layout.

    A collective of all ranks.
    """
    found: list[Shapes | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    joined: dict[str, dict[str, Shape]] = {}
    for shapes in found:
        assert shapes is not None
        for kind, named in shapes.items():
            joined.setdefault(kind, {}).update(named)
    return {kind: {name: named[name] for name in sorted(named, key=_by_number)} for kind, named in joined.items()}


def _by_number(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layers.10 after layers.9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
