"""safetensors files that many ranks write together, each its own bytes, and read by slice.

The library writes a file from one process that holds every tensor. The format itself is plain (a length, a JSON header,
the data in one block: https://github.com/huggingface/safetensors#format), so that with names and shapes known each
byte's place is known, and every rank writes its own with no word to the others.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from megatron_lite.checkpoint.fragments import Transfer
from megatron_lite.config.hf.headers import TensorEntry
from megatron_lite.errors import CheckpointError, library_edge
from megatron_lite.models.stored import Shape, StoredForm

ITEM_BYTES = 4  # fp32: master weights and moments
LARGEST_FILE_BYTES = 2 * 2**30  # several files, so that several ranks hash them
WHOLE_COPY = "bring back a whole copy"
_LENGTH_BYTES = 8  # of the header's length, little-endian


@dataclass(frozen=True)
class TensorFile:
    """One file of fp32 tensors: where each begins follows from the shapes alone."""

    name: str
    """Within the checkpoint's folder."""
    shapes: Mapping[str, Shape]

    @cached_property
    def header(self) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for name, shape in self.shapes.items():
            end = begin + ITEM_BYTES * math.prod(shape)
            entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
            begin = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _LENGTH_BYTES)  # the data begins aligned
        return len(text).to_bytes(_LENGTH_BYTES, "little") + text

    @cached_property
    def begins(self) -> dict[str, int]:
        """Of each tensor, in bytes from the beginning of the file."""
        sizes = (ITEM_BYTES * math.prod(shape) for shape in self.shapes.values())
        return dict(zip(self.shapes, accumulate(sizes, initial=len(self.header)), strict=False))

    @cached_property
    def size_bytes(self) -> int:
        return len(self.header) + ITEM_BYTES * sum(math.prod(shape) for shape in self.shapes.values())

    def create(self, folder: Path) -> None:
        """The header and all the room that the data needs, taken from the disk now.

        Raises:
            OSError: the disk is full.
        """
        path = folder / self.name
        path.parent.mkdir(exist_ok=True)
        with path.open("xb") as file:
            file.write(self.header)
            file.flush()
            os.posix_fallocate(file.fileno(), 0, self.size_bytes)


def split_into_files(stem: str, form: StoredForm, largest_bytes: int = LARGEST_FILE_BYTES) -> list[TensorFile]:
    """`<stem>.safetensors`, or `<stem>-00001-of-0000N.safetensors` and so on where it would be too large."""
    groups: list[dict[str, Shape]] = [{}]
    size = 0
    for name, shape in form.shapes.items():
        own = ITEM_BYTES * math.prod(shape)
        if groups[-1] and size + own > largest_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += own
    if len(groups) == 1:
        return [TensorFile(f"{stem}.safetensors", groups[0])]
    count = len(groups)
    return [TensorFile(f"{stem}-{i:05d}-of-{count:05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def index_of(files: Sequence[TensorFile]) -> str | None:
    """The index.json that transformers expects beside several files; None where there is one."""
    if len(files) == 1:
        return None
    total = sum(ITEM_BYTES * math.prod(shape) for file in files for shape in file.shapes.values())
    places = {name: file.name for file in files for name in file.shapes}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1)


def write(folder: Path, files: Sequence[TensorFile], moved: Iterable[Transfer]) -> None:
    """Put each transfer's values at its place in files that `create` has made, and wait until the disk has them.

    Raises:
        OSError: the disk is full or the folder is gone.
    """
    by_tensor = {name: file for file in files for name in file.shapes}
    descriptors: dict[str, int] = {}
    try:
        for transfer in moved:
            file = by_tensor[transfer.target]
            if file.name not in descriptors:
                descriptors[file.name] = os.open(folder / file.name, os.O_WRONLY)
            for position, data in _runs(transfer, file.shapes[transfer.target], file.begins[transfer.target]):
                _write_at(descriptors[file.name], data, position)
        for descriptor in descriptors.values():
            os.fsync(descriptor)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _write_at(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, position)
        data, position = data[written:], position + written


def _runs(transfer: Transfer, shape: Shape, begin: int) -> Iterator[tuple[int, memoryview]]:
    """Each stretch of the box that is one stretch of the file: (position in bytes, bytes)."""
    values = np.ascontiguousarray(transfer.view.detach().cpu().numpy())
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    # The dimensions from `split` on are taken whole, so that with the one before they lie in one stretch.
    split = len(shape)
    while split > 0 and values.shape[split - 1] == shape[split - 1]:
        split -= 1
    outer = max(split - 1, 0)
    origin = sum(start * stride for start, stride in zip(transfer.start, strides, strict=True))
    rows = values.reshape(*values.shape[:outer], -1)
    for index in np.ndindex(*values.shape[:outer]):
        element = origin + sum(i * stride for i, stride in zip(index, strides[:outer], strict=True))
        yield begin + ITEM_BYTES * element, rows[index].data.cast("B")


class TensorReader:
    """Slices of tensors in safetensors files, of any float type. A context manager."""

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        """
        Args:
            entries: where each tensor lies, by the name that transfers give it.
        Raises:
            CheckpointError: a file is no whole safetensors file.
        """
        self._entries = entries
        self._files: dict[Path, Any] = {}
        for path in {entry.file for entry in entries.values()}:
            with library_edge(CheckpointError, f"{path} is no whole safetensors file", WHOLE_COPY):
                self._files[path] = safe_open(path, framework="pt")

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()  # closes them

    def whole(self, name: str) -> Tensor:
        entry = self._entries[name]
        with library_edge(CheckpointError, f"{entry.file}: {entry.name} cannot be read", WHOLE_COPY):
            return self._files[entry.file].get_tensor(entry.name)

    def read(self, moved: Iterable[Transfer]) -> None:
        """Fill each transfer's memory."""
        for transfer in moved:
            entry = self._entries[transfer.target]
            box = tuple(
                slice(start, start + size) for start, size in zip(transfer.start, transfer.view.shape, strict=True)
            )
            with library_edge(CheckpointError, f"{entry.file}: {entry.name} cannot be read", WHOLE_COPY):
                values = self._files[entry.file].get_slice(entry.name)[box] if box else self.whole(transfer.target)
            with torch.no_grad():
                transfer.view.copy_(values)
