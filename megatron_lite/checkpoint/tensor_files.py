"""safetensors files that many ranks write together and read by slice.

The library can only write a file from one process that holds every tensor. But the format is simple (a length, a JSON
header, one block of data: https://github.com/huggingface/safetensors#format): names and shapes determine the position
of every byte, so every rank writes its own bytes without communication.
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
LARGEST_FILE_BYTES = 2 * 2**30  # limited, so that several ranks can hash the files of a large model
WHOLE_COPY = "restore an undamaged copy"
_LENGTH_BYTES = 8  # size of the length field, little-endian


@dataclass(frozen=True)
class TensorFile:
    """One file of fp32 tensors; the shapes alone determine the position of each tensor."""

    name: str
    """Relative to the checkpoint's folder."""
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
        text += b" " * (-len(text) % _LENGTH_BYTES)  # aligns the data
        return len(text).to_bytes(_LENGTH_BYTES, "little") + text

    @cached_property
    def begins(self) -> dict[str, int]:
        """The offset of each tensor, in bytes from the beginning of the file."""
        sizes = (ITEM_BYTES * math.prod(shape) for shape in self.shapes.values())
        return dict(zip(self.shapes, accumulate(sizes, initial=len(self.header)), strict=False))

    @cached_property
    def size_bytes(self) -> int:
        return len(self.header) + ITEM_BYTES * sum(math.prod(shape) for shape in self.shapes.values())

    def create(self, folder: Path) -> None:
        """Write the header, and reserve the disk space of the data now.

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
    """`<stem>.safetensors`, or `<stem>-00001-of-0000N.safetensors` and so on if it would be too large."""
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
    """The index.json that transformers expects beside several files; None for a single file."""
    if len(files) == 1:
        return None
    total = sum(ITEM_BYTES * math.prod(shape) for file in files for shape in file.shapes.values())
    places = {name: file.name for file in files for name in file.shapes}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1)


def write(folder: Path, files: Sequence[TensorFile], moved: Iterable[Transfer]) -> None:
    """Write the values of each transfer to its position in files that `create` has made, and fsync the files.

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
    """Split the box into runs that are contiguous in the file: (position in bytes, bytes)."""
    values = np.ascontiguousarray(transfer.view.detach().cpu().numpy())
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    # The box spans the dimensions from `split` on completely, so together with the one before they are contiguous.
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
    """Reads slices of tensors in safetensors files, of any float dtype. A context manager."""

    def __init__(self, entries: Mapping[str, TensorEntry]) -> None:
        """
        Args:
            entries: name used in transfers -> where the tensor is stored.
        Raises:
            CheckpointError: a file is not a complete safetensors file.
        """
        self._entries = entries
        self._files: dict[Path, Any] = {}
        for path in {entry.file for entry in entries.values()}:
            with library_edge(CheckpointError, f"{path} is not a complete safetensors file", WHOLE_COPY):
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
        """Fill the memory of each transfer."""
        for transfer in moved:
            entry = self._entries[transfer.target]
            box = tuple(
                slice(start, start + size) for start, size in zip(transfer.start, transfer.view.shape, strict=True)
            )
            with library_edge(CheckpointError, f"{entry.file}: {entry.name} cannot be read", WHOLE_COPY):
                values = self._files[entry.file].get_slice(entry.name)[box] if box else self.whole(transfer.target)
            with torch.no_grad():
                transfer.view.copy_(values)
