"""JSON files that contain a checksum of their own content, so that any damage is detected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from megatron_lite.errors import DamagedFileError
from megatron_lite.state_files import Object, read_object

CHECKSUM = "checksum"


def sealed(content: dict[str, Any]) -> bytes:
    """The bytes of a file with this content and its checksum."""
    text = json.dumps({**content, CHECKSUM: _checksum(content)}, indent=1, ensure_ascii=False)
    return (text + "\n").encode()


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The content of a file that `sealed` made; None if there is no such file.

    Raises:
        DamagedFileError: the content does not match its checksum.
    """
    content = read_object(path, Object)
    if content is None:
        return None
    if content.pop(CHECKSUM, None) != _checksum(content):
        raise DamagedFileError(f"{path} is damaged: its checksum does not match its content")
    return content


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
