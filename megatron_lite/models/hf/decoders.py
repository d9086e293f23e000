"""Decoder-only models: GPT-2 and LLaMA."""

from __future__ import annotations

from megatron_lite.models.hf.builder import FormBuilder


def gpt2_form(form: FormBuilder) -> None:
    """Form of transformers' GPT2LMHeadModel, whose Conv1D layers store [in, out]."""
    form.tensor("embedding.weight", "transformer.wte.weight")
    form.tensor("position_embedding.weight", "transformer.wpe.weight")
    for index in range(form.model.num_layers):
        source, target = f"layers.{index}", f"transformer.h.{index}"
        form.module(f"{source}.attention_norm", f"{target}.ln_1")
        form.joined_qkv(f"{source}.attention.qkv", f"{target}.attn.c_attn")
        form.module(f"{source}.attention.projection", f"{target}.attn.c_proj", transposed=True)
        form.module(f"{source}.mlp_norm", f"{target}.ln_2")
        form.module(f"{source}.mlp.up", f"{target}.mlp.c_fc", transposed=True)
        form.module(f"{source}.mlp.down", f"{target}.mlp.c_proj", transposed=True)
    form.module("final_norm", "transformer.ln_f")
    form.module("head", "lm_head")


def llama_form(form: FormBuilder) -> None:
    """Form of transformers' LlamaForCausalLM."""
    form.tensor("embedding.weight", "model.embed_tokens.weight")
    for index in range(form.model.num_layers):
        source, target = f"layers.{index}", f"model.layers.{index}"
        attention, mlp = f"{target}.self_attn", f"{target}.mlp"
        form.module(f"{source}.attention_norm", f"{target}.input_layernorm")
        form.split_qkv(f"{source}.attention.qkv", (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"))
        form.module(f"{source}.attention.projection", f"{attention}.o_proj")
        form.module(f"{source}.mlp_norm", f"{target}.post_attention_layernorm")
        form.stacked(f"{source}.mlp.gate_up", (f"{mlp}.gate_proj", f"{mlp}.up_proj"))
        form.module(f"{source}.mlp.down", f"{mlp}.down_proj")
    form.module("final_norm", "model.norm")
    form.module("head", "lm_head")
