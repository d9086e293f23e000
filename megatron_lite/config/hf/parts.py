"""Parts of config.json that no table expresses: rotary positions, and what BERT's descendants and T5 calculate."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from megatron_lite.config.hf.family import NoCounterpart, Part, TokenRoles
from megatron_lite.config.hf.reader import ConfigReader
from megatron_lite.config.keys import as_word
from megatron_lite.config.resolved import ResolvedModel

_OF_DEFAULT_POSITIONS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"}


def rotary(default_base: float = 10000.0) -> Part:
    """Rotary positions without scaling, the same in all layers.

    Args:
        default_base: what transformers assumes if config.json has none.
    """
    keys = frozenset({"rope_theta", "rope_parameters", "rope_scaling"})
    return Part(keys, ("rotary_base",), partial(_read_rotary, default_base), _write_rotary)


def _read_rotary(
    default: float, reader: ConfigReader, settings: Mapping[str, Any], names: Collection[str]
) -> dict[str, Any]:
    """The base, from its old and its new key."""
    bases = {}
    for key in ("rope_parameters", "rope_scaling"):
        spec = reader.config.get(key) or {}
        if not isinstance(spec, Mapping):
            reader.refuse(key, spec, "null")
            continue
        kind = spec.get("rope_type", spec.get("type", "default"))
        if kind != "default":
            reader.refuse(f"{key}.rope_type", kind, "default, positions without scaling")
        if spec.get("partial_rotary_factor", 1.0) != 1.0:
            reader.refuse(f"{key}.partial_rotary_factor", spec["partial_rotary_factor"], "1")
        if spec.get("rope_theta") is not None:
            bases[f"{key}.rope_theta"] = reader.typed(f"{key}.rope_theta", spec["rope_theta"], default)
        for unknown in sorted(spec.keys() - _OF_DEFAULT_POSITIONS):
            reader.refuse(f"{key}.{unknown}", spec[unknown], "positions without scaling, the same in all layers")
    if "rope_theta" in reader.config:
        bases["rope_theta"] = reader.value("rope_theta", default)
    (first, base), *others = bases.items() or [("rope_theta", default)]
    for key, other in others:
        if other != base:
            reader.refuse(key, other, f"what {first}={as_word(base)} says, another name of the same")
    return {"rotary_base": base}


def _write_rotary(model: ResolvedModel, tokens: TokenRoles) -> dict[str, Any]:
    base = model.rotary_base  # twice: transformers 4 reads one of them, 5 the other
    return {"rope_theta": base, "rope_parameters": {"rope_type": "default", "rope_theta": base}}


def _read_behind_padding(reader: ConfigReader, settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    offset = 1 + reader.value("pad_token_id", 1, least=0)
    rows = settings["max_position_embeddings"]
    if rows <= offset:
        reader.refuse("max_position_embeddings", rows, f"more than pad_token_id + 1 = {offset}, the unused ones")
    return {"position_offset": offset, "max_position_embeddings": rows - offset}


def _write_behind_padding(model: ResolvedModel, tokens: TokenRoles) -> dict[str, Any]:
    if tokens.pad != model.position_offset - 1:
        raise NoCounterpart(
            "transformers counts positions of such a model from the id of its padding token + 1, which is "
            f"{tokens.pad} here, for model.position_offset={model.position_offset}"
        )
    return {"max_position_embeddings": model.position_offset + model.max_position_embeddings}


POSITIONS_BEHIND_PADDING = Part(
    frozenset(), ("position_offset", "max_position_embeddings"), _read_behind_padding, _write_behind_padding
)
"""RoBERTa's positions start after the padding token's ID."""


def _read_t5_head(reader: ConfigReader, settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    tied = reader.value("tie_word_embeddings", True)
    scaled = reader.value("scale_decoder_outputs", tied)
    if scaled and not tied:
        reader.refuse("scale_decoder_outputs", scaled, "false where tie_word_embeddings=false")
    word = str(reader.config.get("feed_forward_proj", "relu"))
    activation = "gelu_new" if word == "gated-gelu" else word.removeprefix("gated-")
    for key, derived in (("dense_act_fn", activation), ("is_gated_act", word.startswith("gated-"))):
        if reader.config.get(key, derived) != derived:
            reader.refuse(key, reader.config[key], f"what feed_forward_proj={word} says: {as_word(derived)}")
    return {"tie_embeddings": tied and (scaled or "lm_head.weight" not in names), "scale_tied_head": scaled}


def _write_t5_head(model: ResolvedModel, tokens: TokenRoles) -> dict[str, Any]:
    return {
        "tie_word_embeddings": model.tie_embeddings,
        "scale_decoder_outputs": model.tie_embeddings and model.scale_tied_head,
    }


T5_HEAD = Part(
    frozenset({"tie_word_embeddings", "scale_decoder_outputs", "dense_act_fn", "is_gated_act"}),
    ("tie_embeddings", "scale_tied_head"),
    _read_t5_head,
    _write_t5_head,
)
"""The head: tied and scaled in v1.0, neither in v1.1, where the tensor names show whether it is tied. transformers 4
uses tie_word_embeddings for both."""


def _read_equal_stacks(reader: ConfigReader, settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    for kind, default in (("attention_heads", 16), ("ffn_dim", 4096)):
        encoder, decoder = (reader.value(f"{stack}_{kind}", default) for stack in ("encoder", "decoder"))
        if encoder != decoder:
            reader.refuse(f"decoder_{kind}", decoder, f"encoder_{kind}={encoder}")
    return {}


def _write_equal_stacks(model: ResolvedModel, tokens: TokenRoles) -> dict[str, Any]:
    return {"decoder_attention_heads": model.num_attention_heads, "decoder_ffn_dim": model.ffn_hidden_size}


EQUAL_STACKS = Part(
    frozenset({"decoder_attention_heads", "decoder_ffn_dim"}), (), _read_equal_stacks, _write_equal_stacks
)
"""BART's two stacks have the same width."""
