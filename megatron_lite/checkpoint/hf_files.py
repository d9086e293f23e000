"""The files besides tensors that make a checkpoint folder a transformers model folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_lite.config.derived import has_next_sentence_head
from megatron_lite.config.hf import generation_config, hf_config
from megatron_lite.config.hf.export import GENERATION_KEYS
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.data.special import SpecialTokens
from megatron_lite.data.tokenizer.saved_tokenizer import exported_tokens
from megatron_lite.data.tokenizer.tokenizer_files import GENERATION_FILE
from megatron_lite.state_files import Object, decode


def folder_files(
    config: ResolvedConfig, carried: Mapping[str, bytes], *, vocab_size: int, tokens: SpecialTokens, dtype: str
) -> dict[str, bytes]:
    """All files of a model folder except tensors: those of the tokenizer, overwritten by those of the model.

    Args:
        carried: from `PreparedData.tokenizer_files`. Its generation_config.json comes from the initial weights: its
            sampling settings are kept, its token ids are replaced by those of this model.
    Raises:
        NoCounterpart: as for `model_files`.
    """
    files = model_files(config, vocab_size=vocab_size, tokens=tokens, dtype=dtype)
    kept = carried.get(GENERATION_FILE)
    if kept is not None and GENERATION_FILE in files:
        settings = decode(kept, Object, GENERATION_FILE)  # whoever read the tokenizer has checked it
        ours = decode(files[GENERATION_FILE], Object, GENERATION_FILE)
        sampling = {
            key: value for key, value in settings.items() if key not in (*GENERATION_KEYS, "_from_model_config")
        }
        files[GENERATION_FILE] = _as_file({**sampling, **ours})
    return {name: content for name, content in carried.items() if name != GENERATION_FILE} | files


def model_files(config: ResolvedConfig, *, vocab_size: int, tokens: SpecialTokens, dtype: str) -> dict[str, bytes]:
    """Name -> content of config.json and, for a model that generates, generation_config.json.

    Args:
        vocab_size: true vocabulary size, without padded rows.
        dtype: dtype of the stored weights, such as "bfloat16".
    Raises:
        NoCounterpart: transformers has no such model, so the weights are stored under our names.
    """
    next_sentence = has_next_sentence_head(config)
    tokens = exported_tokens(tokens, config)
    described = hf_config(config.model, vocab_size=vocab_size, tokens=tokens, dtype=dtype, next_sentence=next_sentence)
    generation = generation_config(described, stops=() if tokens.eod is None else (tokens.eod,))
    files = {"config.json": _as_file(described)}
    return files | ({} if generation is None else {GENERATION_FILE: _as_file(generation)})


def _as_file(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
