"""What wandb has already written down of a run, read from its own transaction logs, online and offline ones alike."""

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
WHOLE, LAST = 1, 4  # kinds of chunks that end a record


@dataclass(frozen=True)
class Alert:
    title: str
    text: str
    level: str
    """INFO, WARN or ERROR."""


def history(run_dir: Path, run_id: str) -> Iterator[dict[str, Any]]:
    """Each logged row of all attempts at a run, oldest attempt first."""
    for record in _parsed(run_dir, run_id):
        if record.HasField("history"):
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def alerts(run_dir: Path, run_id: str) -> Iterator[Alert]:
    """Each alert of all attempts at a run, oldest attempt first."""
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
                break  # cut short by a kill; nothing that can be read follows
            yield record


def records(log: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks; in them chunks of checksum (4), length (2), kind (1), data."""
    position, record = FILE_HEADER_BYTES, b""
    while position + CHUNK_HEADER_BYTES <= len(log):
        if BLOCK_BYTES - position % BLOCK_BYTES < CHUNK_HEADER_BYTES:
            position += BLOCK_BYTES - position % BLOCK_BYTES
            continue
        length, kind = struct.unpack_from("<HB", log, position + 4)
        start = position + CHUNK_HEADER_BYTES
        record += log[start : start + length]
        position = start + length
        if kind in (WHOLE, LAST):
            yield record
            record = b""
