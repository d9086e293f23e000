"""Encoders: BERT and RoBERTa."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_lite.config.schema import ModelConfig
from megatron_lite.models.hf.parts import affine, self_attention


def from_bert(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Of transformers' BertForPreTraining."""
    full = {
        **_stack(state, "bert", model),
        **affine(state, "bert.pooler.dense", "next_sentence.pooler"),
        **affine(state, "cls.seq_relationship", "next_sentence.classifier"),
        **affine(state, "cls.predictions.transform.dense", "head_transform.dense"),
        **affine(state, "cls.predictions.transform.LayerNorm", "head_transform.norm"),
        "head_bias.bias": state["cls.predictions.bias"],
    }
    if not model.tie_embeddings:
        full["head.weight"] = state["cls.predictions.decoder.weight"]
    return full


def from_roberta(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Of transformers' RobertaForMaskedLM."""
    full = {
        **_stack(state, "roberta", model),
        **affine(state, "lm_head.dense", "head_transform.dense"),
        **affine(state, "lm_head.layer_norm", "head_transform.norm"),
        "head_bias.bias": state["lm_head.bias"],
    }
    if not model.tie_embeddings:
        full["head.weight"] = state["lm_head.decoder.weight"]
    return full


def _stack(state: Mapping[str, Tensor], prefix: str, model: ModelConfig) -> dict[str, Tensor]:
    """The embeddings and the layers."""
    embeddings = f"{prefix}.embeddings"
    full = {
        "embedding.weight": state[f"{embeddings}.word_embeddings.weight"],
        "position_embedding.weight": state[f"{embeddings}.position_embeddings.weight"],
        "segment_embedding.weight": state[f"{embeddings}.token_type_embeddings.weight"],
        **affine(state, f"{embeddings}.LayerNorm", "embedding_norm"),
    }
    for index in range(model.num_layers):
        source, target = f"{prefix}.encoder.layer.{index}", f"layers.{index}"
        own, out = f"{source}.attention.self", f"{source}.attention.output"
        projections = (f"{own}.query", f"{own}.key", f"{own}.value", f"{out}.dense")
        full |= self_attention(state, projections, f"{target}.attention", model)
        full |= affine(state, f"{out}.LayerNorm", f"{target}.attention_norm")
        full |= affine(state, f"{source}.intermediate.dense", f"{target}.mlp.up")
        full |= affine(state, f"{source}.output.dense", f"{target}.mlp.down")
        full |= affine(state, f"{source}.output.LayerNorm", f"{target}.mlp_norm")
    return full
