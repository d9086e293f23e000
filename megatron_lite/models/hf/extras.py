"""Extra tensors in files of transformers, and which of them may be ignored.

Any other tensor must be one of our weights: an unused tensor means that the files hold another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from megatron_lite.config.hf.families import BART, BERT, GPT2, LLAMA, ROBERTA, T5, Family
from megatron_lite.config.hf.translation import WORDS
from megatron_lite.config.keys import as_word
from megatron_lite.config.resolved import ResolvedModel

# Buffers that follow from the settings, and parts that do not affect the logits of the family's class.
_PASSED_OVER = {
    GPT2.model_type: re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"),  # the causal mask
    LLAMA.model_type: re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
    BERT.model_type: re.compile(
        r"(bert\.)?embeddings\.(position_ids|token_type_ids)"
        # next-sentence head, where none is trained
        r"|(bert\.)?pooler\.dense\.(weight|bias)|cls\.seq_relationship\.(weight|bias)"
    ),
    ROBERTA.model_type: re.compile(
        r"(roberta\.)?embeddings\.(position_ids|token_type_ids)|(roberta\.)?pooler\.dense\.(weight|bias)"
    ),
    T5.model_type: re.compile(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"),
    BART.model_type: re.compile(r"(model\.)?(encoder|decoder)\.version"),
}
_WORD_TABLES = {
    GPT2.model_type: "transformer.wte.weight",
    LLAMA.model_type: "model.embed_tokens.weight",
    BERT.model_type: "bert.embeddings.word_embeddings.weight",
    ROBERTA.model_type: "roberta.embeddings.word_embeddings.weight",
    T5.model_type: "shared.weight",
    BART.model_type: "model.shared.weight",
}
_HEADS = {
    GPT2.model_type: "lm_head.weight",
    LLAMA.model_type: "lm_head.weight",
    BERT.model_type: "cls.predictions.decoder.weight",
    ROBERTA.model_type: "lm_head.decoder.weight",
    T5.model_type: "lm_head.weight",
    BART.model_type: "lm_head.weight",
}
_HEAD_BIASES = {BERT.model_type: "cls.predictions", ROBERTA.model_type: "lm_head"}
_TABLES_OF_STACKS = {T5.model_type: "", BART.model_type: "model."}
_LAYER = re.compile(r"(|.*?\.)(?:h|layers?|block)\.(\d+)\.")


def is_passed_over(name: str, family: Family) -> bool:
    return _PASSED_OVER[family.model_type].fullmatch(name) is not None


def twins(family: Family, model: ResolvedModel) -> dict[str, str]:
    """Tensors that may be stored twice -> the one that we read: both must be equal."""
    kind, table = family.model_type, _WORD_TABLES[family.model_type]
    found = {}
    if model.tie_embeddings:
        found[_HEADS[kind]] = table
    if kind in _TABLES_OF_STACKS:
        found |= {f"{_TABLES_OF_STACKS[kind]}{stack}.embed_tokens.weight": table for stack in ("encoder", "decoder")}
    if kind in _HEAD_BIASES:
        first, second = f"{_HEAD_BIASES[kind]}.decoder.bias", f"{_HEAD_BIASES[kind]}.bias"
        found |= {first: second} if model.tie_embeddings else {second: first}
    return found


def flag_of(name: str, family: Family, model: ResolvedModel, names: Iterable[str]) -> str | None:
    """The config.json key, with its value, that decides whether this tensor exists: `num_hidden_layers=2`.

    Args:
        names: of all tensors in the files.
    """
    field = _field_of(name, family, model, names)
    keys = {field: key for key, entry in WORDS[family.model_type].keys.items() for field in entry.fields}
    key = {"vocab_size": "vocab_size", "tie_embeddings": "tie_word_embeddings"}.get(field, keys.get(field))
    return None if key is None else f"{key}={as_word(getattr(model, field))}"


def _field_of(name: str, family: Family, model: ResolvedModel, names: Iterable[str]) -> str:
    """The field of the model that decides it; empty if no single field does."""
    if name.endswith(_HEADS[family.model_type]):
        return "tie_embeddings"
    stack, index = _layer_of(name)
    if index is not None:
        decoder = stack.endswith("decoder.")
        said = model.decoder_layers if decoder else model.num_layers
        there = [number for other, number in map(_layer_of, names) if other == stack and number is not None]
        if index >= min(said, max(there, default=-1) + 1):
            return "num_decoder_layers" if decoder else "num_layers"
        if name.endswith(".bias"):
            return "mlp_bias" if ".mlp." in name else "attention_bias"
    if name.endswith(".".join(_WORD_TABLES[family.model_type].split(".")[-2:])):
        return "vocab_size"
    if re.search(r"(wpe|position_embeddings|embed_positions)\.weight$", name):
        return "max_position_embeddings"
    return "num_segments" if name.endswith("token_type_embeddings.weight") else ""


def _layer_of(name: str) -> tuple[str, int | None]:
    """(name of the stack, index of the layer in it): ("model.decoder.", 2); None = not in a layer."""
    found = _LAYER.match(name)
    return (found[1], int(found[2])) if found else ("", None)
