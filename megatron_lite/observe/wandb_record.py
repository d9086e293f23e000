"""What wandb has already logged for a run, read from its local transaction logs, both online and offline.

A resume needs this so that it does not log the same row or alert twice.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from wandb.proto import wandb_internal_pb2

FILE_HEADER_BYTES = 7
BLOCK_BYTES = 32768
CHUNK_HEADER_BYTES = 7
WHOLE, LAST = 1, 4  # types of chunks that end a record


@dataclass(frozen=True)
class Alert:
    title: str
    text: str
    level: str
    """INFO, WARN or ERROR."""


def history(run_dir: Path, run_id: str) -> Iterator[dict[str, Any]]:
    """All logged rows of all attempts at a run, oldest attempt first."""
    for record in _parsed(run_dir, run_id):
        if record.HasField("history"):
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def alerts(run_dir: Path, run_id: str) -> Iterator[Alert]:
    """All alerts of all attempts at a run, oldest attempt first."""
    for record in _parsed(run_dir, run_id):
        if record.HasField("alert"):
            yield Alert(record.alert.title, record.alert.text, record.alert.level)


def _parsed(run_dir: Path, run_id: str) -> Iterator[Any]:
    for path in sorted((run_dir / "wandb").glob(f"*run-*-{run_id}/*.wandb")):
        for data in records(path.read_bytes()):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]  # made at run time
            try:
                record.ParseFromString(data)
            except DecodeError:
                break  # truncated by a kill; nothing readable follows
            yield record


def records(log: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks of chunks, each with checksum (4 bytes), length (2), type (1)
    and data. A record is one or more chunks."""
    position, record = FILE_HEADER_BYTES, b""
    while position + CHUNK_HEADER_BYTES <= len(log):
        if BLOCK_BYTES - position % BLOCK_BYTES < CHUNK_HEADER_BYTES:  # padding: no header fits in this block any more
            position += BLOCK_BYTES - position % BLOCK_BYTES
            continue
        length, kind = struct.unpack_from("<HB", log, position + 4)
        start = position + CHUNK_HEADER_BYTES
        record += log[start : start + length]
        position = start + length
        if kind in (WHOLE, LAST):
            yield record
            record = b""
