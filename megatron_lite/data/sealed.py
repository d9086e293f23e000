"""JSON files that hold the checksum of their own content, so that no damage goes unseen, whichever byte it hits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from megatron_lite.errors import DamagedFileError
from megatron_lite.state_files import Object, read_object

CHECKSUM = "checksum"


def sealed(content: dict[str, Any]) -> bytes:
    """The file: the content and its checksum."""
    text = json.dumps({**content, CHECKSUM: _checksum(content)}, indent=1, ensure_ascii=False)
    return (text + "\n").encode()


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The content of a file of `sealed`; None where there is no such file.

    Raises:
        DamagedFileError: it is not what was written.
    """
    content = read_object(path, Object)
    if content is None:
        return None
    if content.pop(CHECKSUM, None) != _checksum(content):
        raise DamagedFileError(f"{path} is damaged: its checksum is that of another content")
    return content


def _checksum(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
