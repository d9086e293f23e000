"""Encoder-decoders: T5 and BART."""

from __future__ import annotations

from megatron_lite.models.hf.builder import FormBuilder


def t5_form(form: FormBuilder) -> None:
    """Form of transformers' T5ForConditionalGeneration: v1.0, and v1.1 with its gated MLP and untied head."""
    form.tensor("embedding.weight", "shared.weight")
    for stack, num_layers in _stacks(form).items():
        for index in range(num_layers):
            target = f"{stack}.block.{index}.layer"
            _t5_layer(form, f"{stack}.layers.{index}", target, decoder=stack == "decoder")
            if index == 0:
                table = f"{target}.0.SelfAttention.relative_attention_bias.weight"
                form.tensor(f"{stack}.relative_bias.weight", table)
        form.module(f"{stack}.final_norm", f"{stack}.final_layer_norm")
    form.module("head", "lm_head")


def bart_form(form: FormBuilder) -> None:
    """Form of transformers' BartForConditionalGeneration, whose bias on the logits is never trained."""
    form.tensor("embedding.weight", "model.shared.weight")
    for stack, num_layers in _stacks(form).items():
        form.tensor(f"{stack}.position_embedding.weight", f"model.{stack}.embed_positions.weight")
        form.module(f"{stack}.embedding_norm", f"model.{stack}.layernorm_embedding")
        for index in range(num_layers):
            source, target = f"{stack}.layers.{index}", f"model.{stack}.layers.{index}"
            _bart_layer(form, source, target, decoder=stack == "decoder")
    form.zeros("final_logits_bias", (1, form.shapes["embedding.weight"][0]))


def _stacks(form: FormBuilder) -> dict[str, int]:
    """Number of layers of each stack."""
    return {"encoder": form.model.num_layers, "decoder": form.model.decoder_layers}


def _t5_layer(form: FormBuilder, source: str, target: str, *, decoder: bool) -> None:
    """One layer; the parts of `target` are numbered: self-attention, cross-attention in a decoder, MLP."""
    own = f"{target}.0.SelfAttention"
    form.split_qkv(f"{source}.attention.qkv", (f"{own}.q", f"{own}.k", f"{own}.v"))
    form.module(f"{source}.attention.projection", f"{own}.o")
    form.module(f"{source}.attention_norm", f"{target}.0.layer_norm")
    if decoder:
        cross = f"{target}.1.EncDecAttention"
        form.module(f"{source}.cross_attention.query", f"{cross}.q")
        form.stacked(f"{source}.cross_attention.key_value", (f"{cross}.k", f"{cross}.v"))
        form.module(f"{source}.cross_attention.projection", f"{cross}.o")
        form.module(f"{source}.cross_attention_norm", f"{target}.1.layer_norm")
    part = f"{target}.{2 if decoder else 1}"
    mlp = f"{part}.DenseReluDense"
    form.module(f"{source}.mlp.up", f"{mlp}.wi")
    form.stacked(f"{source}.mlp.gate_up", (f"{mlp}.wi_0", f"{mlp}.wi_1"))
    form.module(f"{source}.mlp.down", f"{mlp}.wo")
    form.module(f"{source}.mlp_norm", f"{part}.layer_norm")


def _bart_layer(form: FormBuilder, source: str, target: str, *, decoder: bool) -> None:
    own = f"{target}.self_attn"
    form.split_qkv(f"{source}.attention.qkv", (f"{own}.q_proj", f"{own}.k_proj", f"{own}.v_proj"))
    form.module(f"{source}.attention.projection", f"{own}.out_proj")
    form.module(f"{source}.attention_norm", f"{own}_layer_norm")
    if decoder:
        cross = f"{target}.encoder_attn"
        form.module(f"{source}.cross_attention.query", f"{cross}.q_proj")
        form.stacked(f"{source}.cross_attention.key_value", (f"{cross}.k_proj", f"{cross}.v_proj"))
        form.module(f"{source}.cross_attention.projection", f"{cross}.out_proj")
        form.module(f"{source}.cross_attention_norm", f"{cross}_layer_norm")
    form.module(f"{source}.mlp.up", f"{target}.fc1")
    form.module(f"{source}.mlp.down", f"{target}.fc2")
    form.module(f"{source}.mlp_norm", f"{target}.final_layer_norm")
