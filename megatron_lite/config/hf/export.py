"""Writes config.json and generation_config.json of a model that we train."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from megatron_lite.config.hf.families import BART, GPT2, LLAMA, ROBERTA, T5, NoCounterpart, counterpart
from megatron_lite.config.hf.translation import WORDS
from megatron_lite.config.resolved import ResolvedModel

GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


class TokenRoles(Protocol):
    """IDs of tokens with a role, such as `data.special.SpecialTokens`; None = there is no such token."""

    @property
    def eod(self) -> int | None: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    @property
    def cls(self) -> int | None: ...
    @property
    def sep(self) -> int | None: ...
    @property
    def pad(self) -> int | None: ...


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
    words = WORDS[family.model_type]
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "torch_dtype": dtype,
        **{key: getattr(model, entry.fields[0]) for key, entry in words.keys.items()},
        words.activation_key: next(word for word, ours in words.activations.items() if ours is model.activation),
        **_SPECIAL.get(family.model_type, _nothing_special)(model),
        **_token_ids(family.model_type, model, tokens),
    }


def generation_config(config: Mapping[str, Any], stops: Sequence[int] = ()) -> dict[str, Any] | None:
    """generation_config.json for this config.json; None for a model that generates nothing.

    Args:
        stops: tokens that end a decoder's text, besides the one in config.json.
    """
    if config["model_type"] not in (GPT2.model_type, LLAMA.model_type, T5.model_type, BART.model_type):
        return None
    described = {key: config[key] for key in GENERATION_KEYS if config.get(key) is not None}
    ends = [token for token in dict.fromkeys([config.get("eos_token_id"), *stops]) if token is not None]
    if config["model_type"] in (GPT2.model_type, LLAMA.model_type) and len(ends) > 1:
        described["eos_token_id"] = ends
    return described


def _nothing_special(model: ResolvedModel) -> dict[str, Any]:
    return {}


def _llama(model: ResolvedModel) -> dict[str, Any]:
    base = model.rotary_base  # twice: transformers 4 reads one of them, 5 the other
    return {"rope_theta": base, "rope_parameters": {"rope_type": "default", "rope_theta": base}}


def _roberta(model: ResolvedModel) -> dict[str, Any]:
    return {"max_position_embeddings": model.position_offset + model.max_position_embeddings}


def _t5(model: ResolvedModel) -> dict[str, Any]:
    """Settings of the head: tied and scaled in v1.0, neither in v1.1. transformers 4 uses the first for both."""
    return {
        "is_encoder_decoder": True,
        "tie_word_embeddings": model.tie_embeddings,
        "scale_decoder_outputs": model.tie_embeddings and model.scale_tied_head,
    }


def _bart(model: ResolvedModel) -> dict[str, Any]:
    return {
        "is_encoder_decoder": True,
        "decoder_attention_heads": model.num_attention_heads,
        "decoder_ffn_dim": model.ffn_hidden_size,
        "scale_embedding": False,
    }


_SPECIAL: dict[str, Callable[[ResolvedModel], dict[str, Any]]] = {
    LLAMA.model_type: _llama,
    ROBERTA.model_type: _roberta,
    T5.model_type: _t5,
    BART.model_type: _bart,
}


def _first(*tokens: int | None) -> int | None:
    """The first one that is not None."""
    return next((token for token in tokens if token is not None), None)


def _token_ids(model_type: str, model: ResolvedModel, tokens: TokenRoles) -> dict[str, int | None]:
    """Token IDs as in the tokenizer next to the weights, and as our objectives use them."""
    eos = _first(tokens.eos, tokens.eod)
    if model_type in (GPT2.model_type, LLAMA.model_type):
        return {"bos_token_id": tokens.bos, "eos_token_id": eos, "pad_token_id": tokens.pad}
    if model_type == T5.model_type:
        return {"eos_token_id": eos, "pad_token_id": tokens.pad, "decoder_start_token_id": tokens.pad}
    if model_type == BART.model_type:
        bos, eos = _first(tokens.bos, tokens.cls), _first(tokens.eos, tokens.sep)
        ends = {"bos_token_id": bos, "eos_token_id": eos, "forced_eos_token_id": eos}
        return {**ends, "pad_token_id": tokens.pad, "decoder_start_token_id": eos}
    if model_type == ROBERTA.model_type:
        if tokens.pad != model.position_offset - 1:
            raise NoCounterpart(
                f"{ROBERTA.architecture} of transformers counts positions from the id of its padding token + 1, which "
                f"is {tokens.pad} here, for model.position_offset={model.position_offset}"
            )
        return {"bos_token_id": tokens.bos, "eos_token_id": eos, "pad_token_id": tokens.pad}
    return {"pad_token_id": tokens.pad}
