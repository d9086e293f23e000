"""Headers and differences of safetensors files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_lite.checkpoint import tensors
from megatron_lite.checkpoint.tensors import StoredTensor, difference, read_header
from megatron_lite.errors import CheckpointError


def one_tensor(path: Path, values: object, dtype: str = "float32") -> StoredTensor:
    save_file({"x": np.array(values, dtype)}, path)
    (tensor,) = read_header(path)
    return tensor


def by_hand(path: Path, dtype: str, shape: list[int], content: bytes) -> StoredTensor:
    """Of types that numpy lacks."""
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(content)]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "x": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content)
    (tensor,) = read_header(path)
    return tensor


def test_header(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array(7, np.int64)}, path, {"format": "pt"})
    found = {tensor.name: tensor for tensor in read_header(path)}
    assert {name: (tensor.dtype, tensor.shape, tensor.elements, tensor.bytes) for name, tensor in found.items()} == {
        "a": ("I64", (), 1, 8),
        "b": ("F32", (2, 3), 6, 24),
    }
    place = found["b"].offset
    assert path.read_bytes()[place : place + 24] == np.arange(6, dtype=np.float32).tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (b"\xff" * 9, "a header of 18,446,744,073,709,551,615 bytes in a file of 9"),
        (struct.pack("<Q", 2) + b"[]", "list"),
        (struct.pack("<Q", 8) + b'{"x": 1}', "int"),
    ],
)
def test_what_is_no_safetensors_file(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.safetensors cannot be read as safetensors \(.*{message}"):
        read_header(tmp_path / "x.safetensors")


def test_truncated_file_is_seen_by_its_header(tmp_path: Path) -> None:
    tensor = one_tensor(tmp_path / "x", [1, 2, 3])
    tensor.file.write_bytes(tensor.file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"tensors up to byte [\d,]+ in a file of "):
        read_header(tensor.file)


@pytest.mark.parametrize("block_elements", [1, 3, 2**20])
@pytest.mark.parametrize(
    ("one", "other", "text"),
    [
        ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7], None),
        ([1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5.5, 6, 6.75], "max abs 0.5"),
        ([0.0, 1, 2], [-0.0, 1, 2], "max abs 0"),  # equal numbers, other bits
        ([np.nan, 1], [np.nan, 1], None),
        ([np.nan, 1], [0, 1], "max abs nan"),
        ([np.inf, 1], [np.inf, 3], "max abs 2"),
        ([np.inf, 1, np.nan, 4], [1, 1, 1, 1], "max abs nan"),
        ([], [], None),
        ([[1, 2]], [[1], [2]], "shape [1, 2] and [2, 1]"),
    ],
)
def test_difference(
    one: list[float],
    other: list[float],
    text: str | None,
    block_elements: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensors, "BLOCK_ELEMENTS", block_elements)
    assert difference(one_tensor(tmp_path / "a", one), one_tensor(tmp_path / "b", other)) == text


def test_other_types(tmp_path: Path) -> None:
    single = one_tensor(tmp_path / "a", [1, -2.5, 3])
    brain = by_hand(tmp_path / "b", "BF16", [3], np.array([1, -2.5, 3], "<f4").view("<u2")[1::2].tobytes())
    assert difference(single, one_tensor(tmp_path / "c", [1, -2.5, 3], "float64")) == "max abs 0 (F32 and F64)"
    assert difference(single, brain) == "max abs 0 (F32 and BF16)"
    other = by_hand(tmp_path / "d", "BF16", [3], np.array([1, -2.5, 2], "<f4").view("<u2")[1::2].tobytes())
    assert difference(brain, brain) is None
    assert difference(brain, other) == "max abs 1"
    tiny, same, unlike = (by_hand(tmp_path / name, "F8_E4M3", [2], content) for name, content in
                          (("e", b"ab"), ("f", b"ab"), ("g", b"ac")))  # fmt: skip
    assert difference(tiny, same) is None
    assert difference(tiny, unlike) == "other bytes (F8_E4M3)"
