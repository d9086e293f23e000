"""The JSON file beside a pair of shards, which records how they were made. Copy it together with the pair."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec

from megatron_lite.data.special import SpecialTokens
from megatron_lite.errors import DamagedFileError, DataError
from megatron_lite.state_files import Object, read_object

REQUIRED = {"tokenizer_hash", "tokenizer_folder", "vocab_size", "eod_id"}


@dataclass(frozen=True)
class _Sidecar:
    """The fields that are read, with their types: special tokens, the tokenizer, the checksums of the pair."""

    tokenizer_hash: str
    tokenizer_folder: str
    vocab_size: int
    eod_id: int | None
    special: dict[str, int | list[int] | None] | None = None
    bin_xxh3: str = ""
    idx_xxh3: str = ""


def sidecar_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".json")


def write_sidecar(prefix: Path, content: dict[str, Any]) -> None:
    assert content.keys() >= REQUIRED
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    sidecar_path(prefix).write_text(text, encoding="utf-8")


def read_sidecar(prefix: Path) -> dict[str, Any] | None:
    """What `prepare` recorded beside a pair of shards; None for shards that another tool made.

    Raises:
        DataError: the file exists but is damaged.
    """
    path = sidecar_path(prefix)
    try:
        content = read_object(path, Object)
        if content is None or not content.keys() >= REQUIRED:
            return None
        roles = msgspec.convert(content, _Sidecar).special or {}
        if unknown := roles.keys() - {role.name for role in fields(SpecialTokens)}:
            raise DamagedFileError(f"there is no token role {min(unknown)}")
    except (DamagedFileError, msgspec.ValidationError) as error:
        raise DataError(f"{path} cannot be read ({error}); copy it again, or remove it") from None
    return content
