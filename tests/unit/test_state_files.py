"""Small files are read with distrust: every damage is one kind of error, and none is anything else."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.errors import DamagedFileError, DataError, library_edge
from megatron_lite.state_files import DamagedLine, Object, decode, lines_of, read_object, read_text


@dataclass(frozen=True)
class Note:
    step: int
    message: str
    time: float


NOTE = Note(3, "saved", 12.5)
WRITTEN = json.dumps(asdict(NOTE)).encode()


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "note.json"
    assert read_object(path, Note) is None
    path.write_bytes(WRITTEN)
    assert read_object(path, Note) == NOTE


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (bytes(40), "it consists of zero bytes"),
        (WRITTEN[:-4], "truncated"),
        (b"[1, 2]", "Expected `object`"),
        (b'{"step": "3", "message": "", "time": 0}', "Expected `int`, got `str`"),
        (b'{"message": "", "time": 0}', "missing required field `step`"),
        (b"[" * 100_000, "Expected `object`"),
        (b'{"other": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"step": 3, "message": "\xff\xfe", "time": 0}', "UTF-8"),
        (b'{"step": ' + b"9" * 6000 + b', "message": "", "time": 0}', "out of range"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "note.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=reason) as caught:
        read_object(path, Note)
    assert str(path) in str(caught.value)


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(DamagedFileError, match="cannot be read: it is not a regular file"):
        read_object(tmp_path, Note)


@given(place=st.integers(0, len(WRITTEN) - 1), byte=st.integers(0, 255))
def test_one_changed_byte_is_read_as_a_note_or_named(place: int, byte: int) -> None:
    changed = WRITTEN[:place] + bytes([byte]) + WRITTEN[place + 1 :]
    try:
        assert isinstance(decode(changed, Note, "note.json"), Note)
    except DamagedFileError:
        assert changed != WRITTEN


def test_lines_keep_their_numbers_around_damage() -> None:
    content = WRITTEN + b"\n" + b"\0\0\n" + WRITTEN + b"\n" + WRITTEN[:5]
    found = list(lines_of(content, Note, "notes.jsonl"))
    assert [isinstance(line, Note) for line in found] == [True, False, True, False]
    assert [line.number for line in found if isinstance(line, DamagedLine)] == [2, 4]


def test_unicode_line_breaks_are_part_of_a_line() -> None:
    content = '{"text": "a\u2028b\u0085c"}\n'.encode()
    assert list(lines_of(content, Object, "x")) == [{"text": "a\u2028b\u0085c"}]


def test_text_that_is_not_utf8_can_be_shown(tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_bytes(b"caf\xe9")
    assert read_text(tmp_path / "error.txt") == "caf\ufffd"


class StrangeError(BaseException):
    """What no list of exceptions foresees."""


def test_any_exception_of_a_library_becomes_ours() -> None:
    class OddError(Exception):
        pass

    with (
        pytest.raises(DataError, match=r"^x.parquet, row 3: OddError: first line; convert it$") as caught,
        library_edge(DataError, "x.parquet, row 3", "convert it"),
    ):
        raise OddError("\nfirst line\nsecond line")
    assert isinstance(caught.value.__cause__, OddError)


@pytest.mark.parametrize("kept", [DataError("ours"), MemoryError(), StrangeError()])
def test_errors_of_ours_and_of_the_machine_pass(kept: BaseException) -> None:
    with pytest.raises(type(kept)) as caught, library_edge(DataError, "x"):
        raise kept
    assert caught.value is kept
