"""What makes the folder of a checkpoint a model folder of transformers, beside the tensors."""

from __future__ import annotations

import json
from typing import Any

from megatron_lite.config.derived import has_next_sentence_head
from megatron_lite.config.hf import generation_config, hf_config
from megatron_lite.config.schema import RunConfig
from megatron_lite.data.saved_tokenizer import exported_tokens
from megatron_lite.data.special import SpecialTokens


def model_files(config: RunConfig, *, vocab_size: int, tokens: SpecialTokens, dtype: str) -> dict[str, bytes]:
    """Name -> content of config.json and, for a model that generates, generation_config.json.

    The tokenizer's files come from `PreparedData.tokenizer_files`, whatever the model.

    Args:
        vocab_size: true vocabulary, without padded rows.
        dtype: of the stored weights, such as "bfloat16".
    Raises:
        NoCounterpart: transformers has no such model, so the weights are stored under our names.
    """
    next_sentence = has_next_sentence_head(config)
    tokens = exported_tokens(tokens, config)
    described = hf_config(config.model, vocab_size=vocab_size, tokens=tokens, dtype=dtype, next_sentence=next_sentence)
    generation = generation_config(described, stops=() if tokens.eod is None else (tokens.eod,))
    files = {"config.json": _as_file(described)}
    return files | ({} if generation is None else {"generation_config.json": _as_file(generation)})


def _as_file(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
