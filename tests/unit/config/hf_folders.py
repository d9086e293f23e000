"""Tiny folders as transformers writes them, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.config.derived import resolve_model
from megatron_lite.config.hf import hf_config
from megatron_lite.config.schema import ModelConfig
from megatron_lite.models.hf import stored_form
from megatron_lite.models.shapes import parameter_shapes

SPECIAL = {"<|endoftext|>": 0, "[PAD]": 1}


@dataclass
class Ids:
    """A test's tokens with a role."""

    eod: int | None = 0
    bos: int | None = 0
    eos: int | None = None
    cls: int | None = 2
    sep: int | None = 3
    pad: int | None = 1


def write_safetensors(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A file of zeros in fp32."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 4
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(offset))


def write_tokenizer(folder: Path, size: int) -> None:
    """A tokenizer.json of `size` tokens, of which only the size is ever read."""
    vocab = {f"t{index}": index for index in range(size)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))


def tensor_shapes(model: ModelConfig, vocab_size: int, *, next_sentence: bool = False) -> dict[str, tuple[int, ...]]:
    """Of the files of a model, by transformers' names."""
    resolved = resolve_model(model)
    shapes = parameter_shapes(resolved, vocab_size, next_sentence=next_sentence)
    return dict(stored_form(resolved, shapes).shapes)


def write_folder(
    folder: Path, model: ModelConfig, *, next_sentence: bool = False, vocab_size: int = 50, tokens: int = 40
) -> Path:
    """config.json, a tokenizer and tensors of zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = model.num_segments == 2
    config = hf_config(resolve_model(model), vocab_size=vocab_size, tokens=Ids(), next_sentence=pairs)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensor_shapes(model, vocab_size, next_sentence=next_sentence))
    if tokens:
        write_tokenizer(folder, tokens)
    return folder
