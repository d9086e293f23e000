"""Differences of tensors in safetensors files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_lite.checkpoint import tensors
from megatron_lite.checkpoint.tensors import difference
from megatron_lite.config.hf.headers import TensorEntry, entries_of


def one_tensor(path: Path, values: object, dtype: str = "float32") -> TensorEntry:
    save_file({"x": np.array(values, dtype)}, path)
    return entries_of(path)["x"]


def by_hand(path: Path, dtype: str, shape: list[int], content: bytes) -> TensorEntry:
    """Of types that numpy lacks."""
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(content)]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "x": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content)
    return entries_of(path)["x"]


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
