"""The JSON file beside a pair of shards, which says what made them. It goes with the pair when it is copied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_lite.errors import DataError

REQUIRED = {"tokenizer_hash", "tokenizer_folder", "vocab_size", "eod_id"}


def sidecar_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".json")


def write_sidecar(prefix: Path, content: dict[str, Any]) -> None:
    assert content.keys() >= REQUIRED
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    sidecar_path(prefix).write_text(text, encoding="utf-8")


def read_sidecar(prefix: Path) -> dict[str, Any] | None:
    """What `prepare` recorded beside a pair of shards it made; None for shards from elsewhere.

    Raises:
        DataError: the file is there but is no JSON.
    """
    path = sidecar_path(prefix)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); copy it again, or remove it") from None
    return content if isinstance(content, dict) and content.keys() >= REQUIRED else None
