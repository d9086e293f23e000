"""Writes config.json and generation_config.json of a model that we train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_lite.config.hf.families import counterpart, of_type
from megatron_lite.config.hf.family import Family, TokenRoles
from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.config.schema import Architecture

GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def hf_config(
    model: ResolvedModel, *, vocab_size: int, tokens: TokenRoles, dtype: str = "float32", next_sentence: bool = False
) -> dict[str, Any]:
    """config.json with which transformers computes the same logits from the same weights.

    Args:
        vocab_size: true vocabulary, without padded rows.
        tokens: token roles with which the data was made.
        dtype: of the stored weights, such as "bfloat16".
        next_sentence: an encoder also classifies pairs (`derived.has_next_sentence_head`).
    Raises:
        NoCounterpart: transformers has no model with these settings.
    """
    family = counterpart(model, next_sentence=next_sentence)
    words = family.activations.items()
    found = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "torch_dtype": dtype,
        **{key: getattr(model, entry.fields[0]) for key, entry in family.keys.items()},
        family.activation_key: next(word for word, ours in words if ours is model.activation),
        **family.constants,
        **_token_ids(family, tokens),
    }
    for part in family.parts:
        found |= part.write(model, tokens)
    return found


def generation_config(config: Mapping[str, Any], stops: Sequence[int] = ()) -> dict[str, Any] | None:
    """generation_config.json for this config.json; None for a model that generates nothing.

    Args:
        stops: tokens that end a decoder's text, besides the one in config.json.
    """
    kind = of_type(config["model_type"])[0].kind
    if kind is Architecture.encoder:
        return None
    described = {key: config[key] for key in GENERATION_KEYS if config.get(key) is not None}
    ends = [token for token in dict.fromkeys([config.get("eos_token_id"), *stops]) if token is not None]
    if kind is Architecture.decoder and len(ends) > 1:
        described["eos_token_id"] = ends
    return described


def _token_ids(family: Family, tokens: TokenRoles) -> dict[str, int | None]:
    """Token IDs as in the tokenizer next to the weights, and as our objectives use them."""
    there = {key: [getattr(tokens, role) for role in roles] for key, roles in family.tokens.items()}
    return {key: next((token for token in found if token is not None), None) for key, found in there.items()}
