"""Encoders: BERT and RoBERTa."""

from __future__ import annotations

from megatron_lite.models.hf.builder import FormBuilder


def bert_form(form: FormBuilder) -> None:
    """Form of transformers' BertForPreTraining; without a next-sentence head, of BertForMaskedLM."""
    _stack(form, "bert")
    form.module("next_sentence.pooler", "bert.pooler.dense")
    form.module("head_transform.dense", "cls.predictions.transform.dense")
    form.module("head_transform.norm", "cls.predictions.transform.LayerNorm")
    _head(form, "cls.predictions")
    form.module("next_sentence.classifier", "cls.seq_relationship")


def roberta_form(form: FormBuilder) -> None:
    """Form of transformers' RobertaForMaskedLM."""
    _stack(form, "roberta")
    form.module("head_transform.dense", "lm_head.dense")
    form.module("head_transform.norm", "lm_head.layer_norm")
    _head(form, "lm_head")


def _head(form: FormBuilder, prefix: str) -> None:
    """The logits' bias has two names: `bias` with a tied head, `decoder.bias` with an untied one."""
    bias = "head_bias.bias"
    if "head.weight" not in form.shapes:
        form.tensor(bias, f"{prefix}.bias")
        return
    form.zeros(f"{prefix}.bias", form.shapes[bias])
    form.tensor("head.weight", f"{prefix}.decoder.weight")
    form.tensor(bias, f"{prefix}.decoder.bias")


def _stack(form: FormBuilder, prefix: str) -> None:
    """The embeddings and the layers."""
    embeddings = f"{prefix}.embeddings"
    form.tensor("embedding.weight", f"{embeddings}.word_embeddings.weight")
    form.tensor("position_embedding.weight", f"{embeddings}.position_embeddings.weight")
    form.tensor("segment_embedding.weight", f"{embeddings}.token_type_embeddings.weight")
    form.module("embedding_norm", f"{embeddings}.LayerNorm")
    for index in range(form.model.num_layers):
        source, target = f"layers.{index}", f"{prefix}.encoder.layer.{index}"
        own, out = f"{target}.attention.self", f"{target}.attention.output"
        form.split_qkv(f"{source}.attention.qkv", (f"{own}.query", f"{own}.key", f"{own}.value"))
        form.module(f"{source}.attention.projection", f"{out}.dense")
        form.module(f"{source}.attention_norm", f"{out}.LayerNorm")
        form.module(f"{source}.mlp.up", f"{target}.intermediate.dense")
        form.module(f"{source}.mlp.down", f"{target}.output.dense")
        form.module(f"{source}.mlp_norm", f"{target}.output.LayerNorm")
