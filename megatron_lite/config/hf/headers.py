"""Locates tensors in safetensors files using only their headers: nothing here reads a tensor.

A file is 8 bytes, the length n of its header; n bytes of JSON, {name: {dtype, shape, data_offsets}}; the tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from megatron_lite.errors import CheckpointError, DamagedFileError
from megatron_lite.state_files import Object, decode, read_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
ITEM_BYTES = {
    "BOOL": 1,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
_FILE_NAME = re.compile(r"[^/\\\0]+\.safetensors")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_MAX_DIMENSIONS = 64  # numpy's own limit; torch's is the same
_SHOWN_CHARACTERS = 200  # of the content of a damaged header


@dataclass(frozen=True)
class TensorEntry:
    """Location of a tensor."""

    file: Path
    name: str
    """Name in the file."""
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""
    shape: tuple[int, ...]
    offsets: tuple[int, int]
    """Of its first byte, and after its last, from the beginning of the file."""


def has_tensors(folder: Path) -> bool:
    """Whether the folder holds safetensors of a model."""
    return (folder / INDEX_FILE).is_file() or (folder / SINGLE_FILE).is_file()


def tensors_of(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model folder, by its name in the files: one, or several with an index.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, does not match the index, or the folder holds the
            files of two models.
    """
    if not (folder / INDEX_FILE).is_file():
        _require_one_model(folder, {SINGLE_FILE})
        return entries_of(folder / SINGLE_FILE)
    found: dict[str, TensorEntry] = {}
    places = _index(folder / INDEX_FILE)
    files = sorted(set(places.values()))
    _require_one_model(folder, set(files))
    strays = []
    for file in files:
        entries = entries_of(folder / file)
        found |= {name: entry for name, entry in entries.items() if places.get(name) == file}
        strays += [f"{name} in {file}" for name in entries if places.get(name) != file]
    lost = sorted(places.keys() - found.keys())
    if lost:
        raise CheckpointError(
            f"{folder / INDEX_FILE} names {lost[0]} in {places[lost[0]]}, which does not hold it"
            + (f" ({len(lost)} tensors in all)" if len(lost) > 1 else "")
            + "; copy the folder again from where it came"
        )
    if strays:
        raise CheckpointError(
            f"{folder / INDEX_FILE} does not name {strays[0]}, which is there"
            + (f" ({len(strays)} tensors in all)" if len(strays) > 1 else "")
            + "; copy the folder again from where it came"
        )
    return found


def _require_one_model(folder: Path, used: set[str]) -> None:
    """transformers prefers the single file and we prefer the index, so a folder with both models is ambiguous."""
    others = {path.name for path in folder.glob("model*.safetensors")} - used
    left = sorted(name for name in others if name == SINGLE_FILE or _SHARD.fullmatch(name))
    if left:
        raise CheckpointError(
            f"{folder} holds the weights of two models: {_listed(sorted(used))}, and {_listed(left)}; remove those "
            "that are left over from an earlier save"
        )


def entries_of(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of one file.

    Raises:
        CheckpointError: it is missing, truncated or damaged.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(file, f"its header of {length:,} bytes does not fit its {size:,} bytes")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); copy it again from where it came") from error
    try:
        header = decode(text, Object, "its header")
    except DamagedFileError as error:
        raise _damaged(file, str(error)) from error
    entries = {
        name: _entry(file, name, fields, 8 + length) for name, fields in header.items() if name != "__metadata__"
    }
    _require_gapless(file, entries.values(), 8 + length, size)
    return entries


def _require_gapless(file: Path, entries: Iterable[TensorEntry], begin: int, size: int) -> None:
    """Each byte after the header belongs to one tensor: the format allows neither gaps nor sharing."""
    end = begin
    for entry in sorted(entries, key=lambda entry: entry.offsets):
        if entry.offsets[0] != end:
            what = "overlaps the tensor before it" if entry.offsets[0] < end else "leaves a hole before it"
            raise _damaged(file, f"{entry.name} {what}, at byte {entry.offsets[0]:,} instead of {end:,}")
        end = entry.offsets[1]
    if end != size:
        raise _damaged(file, f"its header describes {end:,} bytes, and it has {size:,}")


def _entry(file: Path, name: str, fields: Any, base: int) -> TensorEntry:
    shown = repr(fields)
    shown = shown if len(shown) <= _SHOWN_CHARACTERS else f"{shown[:_SHOWN_CHARACTERS]}..."
    if not isinstance(fields, dict) or not isinstance(fields.get("dtype"), str):
        raise _damaged(file, f"its header describes {name} as {shown}")
    shape, offsets, dtype = fields.get("shape"), fields.get("data_offsets"), fields["dtype"]
    if not (_are_sizes(shape, _MAX_DIMENSIONS) and _are_sizes(offsets, 2) and len(offsets) == 2):
        raise _damaged(file, f"its header describes {name} as {shown}")
    if dtype not in ITEM_BYTES:
        raise _damaged(file, f"its header describes {name} as {shown}")
    start, stop = offsets
    if stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise _damaged(file, f"{name} has {stop - start:,} bytes for shape {list(shape)} of {dtype}")
    return TensorEntry(file, name, dtype, tuple(shape), (base + start, base + stop))


def _are_sizes(value: Any, most: int) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > most:
        return False
    return all(type(size) is int and size >= 0 for size in value)  # bool is a subclass of int


def _index(path: Path) -> Mapping[str, str]:
    """Tensor name -> file."""
    try:
        found = read_object(path, _Index)
    except DamagedFileError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again from where it came") from error
    places = {} if found is None else found.weight_map
    foreign = [file for file in places.values() if not _FILE_NAME.fullmatch(file)]  # never a file of another folder
    if not places or foreign:
        what = f"weight_map names {foreign[0]!r}, which is" if foreign else "weight_map names"
        raise CheckpointError(
            f"{path} cannot be read ({what} no file of this folder); copy it again from where it came"
        )
    return places


@dataclass(frozen=True)
class _Index:
    weight_map: dict[str, str]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _damaged(file: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"{file} is cut off or damaged: {fault}; copy it again from where it came")
