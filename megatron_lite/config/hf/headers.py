"""What lies where in safetensors files, from their headers alone: nothing here reads a tensor.

A file is 8 bytes, the length n of its header; n bytes of JSON, {name: {dtype, shape, data_offsets}}; the tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own bound
ITEM_BYTES = {
    "BOOL": 1,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
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
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies."""

    file: Path
    name: str
    """In the file."""
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""
    shape: tuple[int, ...]
    offsets: tuple[int, int]
    """Of its first byte, and behind its last, from the beginning of the file."""


def has_tensors(folder: Path) -> bool:
    """Whether the folder holds safetensors of a model."""
    return (folder / INDEX_FILE).is_file() or (folder / SINGLE_FILE).is_file()


def tensors_of(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of a model folder, by its name in the files: one, or several with an index.

    Raises:
        CheckpointError: a file is missing, cut off or damaged, or is not what the index says.
    """
    if not (folder / INDEX_FILE).is_file():
        return entries_of(folder / SINGLE_FILE)
    found: dict[str, TensorEntry] = {}
    places = _index(folder / INDEX_FILE)
    for file in sorted(set(places.values())):
        entries = entries_of(folder / file)
        found |= {name: entry for name, entry in entries.items() if places.get(name) == file}
    lost = sorted(places.keys() - found.keys())
    if lost:
        raise CheckpointError(
            f"{folder / INDEX_FILE} names {lost[0]} in {places[lost[0]]}, which does not hold it"
            + (f" ({len(lost)} tensors in all)" if len(lost) > 1 else "")
            + "; copy the folder again from where it came"
        )
    return found


def entries_of(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of one file.

    Raises:
        CheckpointError: it is missing, cut off or damaged.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise _damaged(file, f"its header of {length:,} bytes does not fit its {size:,} bytes")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); copy it again from where it came") from error
    except ValueError as error:
        raise _damaged(file, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(file, "its header is no JSON object")
    entries = {
        name: _entry(file, name, fields, 8 + length) for name, fields in header.items() if name != "__metadata__"
    }
    end = max((entry.offsets[1] for entry in entries.values()), default=8 + length)
    if end != size:
        raise _damaged(file, f"its header describes {end:,} bytes, and it has {size:,}")
    return entries


def _entry(file: Path, name: str, fields: Any, base: int) -> TensorEntry:
    try:
        shape, (start, stop) = tuple(map(int, fields["shape"])), map(int, fields["data_offsets"])
        entry = TensorEntry(file, name, str(fields["dtype"]), shape, (base + start, base + stop))
        right = stop - start == math.prod(shape) * ITEM_BYTES[entry.dtype] and start >= 0 and min(shape, default=0) >= 0
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, f"its header describes {name} as {fields}") from error
    if not right:
        raise _damaged(file, f"{name} has {stop - start:,} bytes for shape {list(shape)} of {entry.dtype}")
    return entry


def _index(path: Path) -> Mapping[str, str]:
    """Name -> file."""
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = set(places.values())
        if not files or any(Path(file).name != file for file in files):  # never a file of another folder
            raise ValueError("weight_map names no file of this folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again from where it came") from error
    return dict(places)


def _damaged(file: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"{file} is cut off or damaged: {fault}; copy it again from where it came")
