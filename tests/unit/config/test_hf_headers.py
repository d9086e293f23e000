"""Headers of safetensors: what is whole is read, what is not is refused with its file."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.config.hf.headers import INDEX_FILE, SINGLE_FILE, tensors_of
from megatron_lite.errors import CheckpointError
from tests.unit.config.hf_folders import write_safetensors
from tests.unit.remedies import obeys

SHAPES = {"a.weight": (3, 4), "a.bias": (3,), "empty": (0, 4), "scalar": ()}


def rewrite(file: Path, header: bytes, data: int = 0) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data))


def test_a_single_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / SINGLE_FILE, SHAPES)
    found = tensors_of(tmp_path)
    assert {name: entry.shape for name, entry in found.items()} == SHAPES
    assert found["a.bias"].offsets[1] - found["a.bias"].offsets[0] == 12
    assert found["scalar"].offsets[1] == (tmp_path / SINGLE_FILE).stat().st_size


def test_offsets_are_those_at_which_safetensors_itself_reads(tmp_path: Path) -> None:
    numpy, safetensors = pytest.importorskip("numpy"), pytest.importorskip("safetensors.numpy")
    array = numpy.arange(12, dtype=numpy.float32).reshape(3, 4)
    safetensors.save_file({"x": array, "y": array[:1] + 1}, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    entry = tensors_of(tmp_path)["x"]
    start, stop = entry.offsets
    assert entry.file.read_bytes()[start:stop] == array.tobytes()
    assert (entry.dtype, entry.shape) == ("F32", (3, 4))


@obeys("megatron_lite/config/hf/headers.py:tensors_of")
def test_an_index_of_several_files(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "one.safetensors", {"a": (2,)})
    write_safetensors(tmp_path / "two.safetensors", {"b": (3,)})
    places = {"a": "one.safetensors", "b": "two.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert {name: entry.file.name for name, entry in tensors_of(tmp_path).items()} == places
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": places | {"c": "two.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"names c in two\.safetensors, which does not hold it"):
        tensors_of(tmp_path)
    write_safetensors(tmp_path / "one.safetensors", {"a": (2,), "stray": (2,)})
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=r"does not name stray in one\.safetensors, which is there"):
        tensors_of(tmp_path)
    write_safetensors(tmp_path / "one.safetensors", {"a": (2,)})  # copied again
    assert set(tensors_of(tmp_path)) == {"a", "b"}


@pytest.mark.parametrize("other", [SINGLE_FILE, "model-00001-of-00002.safetensors"])
def test_a_folder_of_two_models(tmp_path: Path, other: str) -> None:
    """transformers reads the single file of such a folder."""
    write_safetensors(tmp_path / "one.safetensors", {"a": (2,)})
    write_safetensors(tmp_path / other, {"a": (2,)})
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(CheckpointError, match=f"two models: one.safetensors, and {other}; remove"):
        tensors_of(tmp_path)
    (tmp_path / other).unlink()
    assert set(tensors_of(tmp_path)) == {"a"}


def test_an_index_of_one_file_of_the_usual_name(tmp_path: Path) -> None:
    write_safetensors(tmp_path / SINGLE_FILE, {"a": (2,)})
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": SINGLE_FILE}}))
    assert set(tensors_of(tmp_path)) == {"a"}


@obeys("megatron_lite/config/hf/headers.py:_index")
@pytest.mark.parametrize(
    "index",
    [
        "{",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../x.safetensors"}}',
        "[" * 100_000,
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "..\\u0000.safetensors"}}',
        "\x00" * 40,
    ],
)
def test_an_index_that_is_none(tmp_path: Path, index: str) -> None:
    write_safetensors(tmp_path / "one.safetensors", {"a": (2,)})
    (tmp_path / INDEX_FILE).write_text(index)
    with pytest.raises(CheckpointError, match=r"cannot be read .*; copy it again from where it came"):
        tensors_of(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert set(tensors_of(tmp_path)) == {"a"}


@pytest.mark.parametrize("cut", [1, 4, 12, 40])
def test_a_file_that_is_cut_off(tmp_path: Path, cut: int) -> None:
    file = tmp_path / SINGLE_FILE
    write_safetensors(file, SHAPES)
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match=r"cut off or damaged: its header describes"):
        tensors_of(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 8, 30])
def test_a_header_that_is_cut_off(tmp_path: Path, kept: int) -> None:
    file = tmp_path / SINGLE_FILE
    write_safetensors(file, SHAPES)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        tensors_of(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]},
        {"dtype": "F32", "shape": [2**31, 2**31, 2**31], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [10**30], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]},
        [1, 2],
    ],
)
def test_an_entry_that_cannot_be(tmp_path: Path, entry: object) -> None:
    rewrite(tmp_path / SINGLE_FILE, json.dumps({"x": entry}).encode(), 4)
    with pytest.raises(CheckpointError, match="cut off or damaged"):
        tensors_of(tmp_path)


@pytest.mark.parametrize(
    "header",
    [b"[" * 100_000, b'{"a":' * 100_000, b'{"x": ' + b"[" * 100_000, b"\xff\xfe", b"\0" * 64, b"[]", b"1", b""],
    ids=["lists", "objects", "inner", "not UTF-8", "zeros", "list", "number", "empty"],
)
def test_a_header_that_is_none(tmp_path: Path, header: bytes) -> None:
    rewrite(tmp_path / SINGLE_FILE, header)
    with pytest.raises(CheckpointError, match="cut off or damaged: its header"):
        tensors_of(tmp_path)


@pytest.mark.parametrize(("second", "what"), [((2, 6), "overlaps"), ((8, 12), "leaves a hole")])
def test_tensors_that_overlap_or_leave_a_hole(tmp_path: Path, second: tuple[int, int], what: str) -> None:
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    rewrite(tmp_path / SINGLE_FILE, json.dumps({"x": one, "y": one | {"data_offsets": second}}).encode(), second[1])
    with pytest.raises(CheckpointError, match=f"y {what}"):
        tensors_of(tmp_path)


@given(position=st.integers(0), byte=st.integers(0, 255))
@settings(max_examples=200, deadline=None)
def test_any_damaged_byte_is_read_or_refused(position: int, byte: int) -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder, SINGLE_FILE)
        write_safetensors(file, SHAPES)
        content = bytearray(file.read_bytes())
        content[position % len(content)] = byte
        file.write_bytes(content)
        refused = SINGLE_FILE
        try:
            assert all(entry.offsets[1] <= len(content) for entry in tensors_of(Path(folder)).values())
        except CheckpointError as error:
            refused = str(error)
        assert SINGLE_FILE in refused


@obeys("megatron_lite/config/hf/headers.py:entries_of")
def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read .*; copy it again from where it came"):
        tensors_of(tmp_path)
    write_safetensors(tmp_path / SINGLE_FILE, {"a": (2,)})
    assert set(tensors_of(tmp_path)) == {"a"}
