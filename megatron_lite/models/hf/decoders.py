"""Decoder-only models: GPT-2 and LLaMA."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_lite.config.schema import ModelConfig
from megatron_lite.models.hf.parts import affine, fuse_qkv, gated_mlp, self_attention


def from_gpt2(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Of transformers' GPT2LMHeadModel, whose Conv1D layers store [in, out]."""
    full = {
        "embedding.weight": state["transformer.wte.weight"],
        "position_embedding.weight": state["transformer.wpe.weight"],
        **affine(state, "transformer.ln_f", "final_norm"),
    }
    if not model.tie_embeddings:
        full["head.weight"] = state["lm_head.weight"]
    for index in range(model.num_layers):
        source, target = f"transformer.h.{index}", f"layers.{index}"
        full |= affine(state, f"{source}.ln_1", f"{target}.attention_norm")
        full |= affine(state, f"{source}.ln_2", f"{target}.mlp_norm")
        full |= affine(state, f"{source}.attn.c_proj", f"{target}.attention.projection", transpose=True)
        full |= affine(state, f"{source}.mlp.c_fc", f"{target}.mlp.up", transpose=True)
        full |= affine(state, f"{source}.mlp.c_proj", f"{target}.mlp.down", transpose=True)
        fused = affine(state, f"{source}.attn.c_attn", "", transpose=True)
        for kind, (query, key, value) in ((kind, rows.chunk(3)) for kind, rows in fused.items()):
            full[f"{target}.attention.qkv{kind}"] = fuse_qkv(query, key, value, model)
    return full


def from_llama(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Of transformers' LlamaForCausalLM."""
    full = {
        "embedding.weight": state["model.embed_tokens.weight"],
        **affine(state, "model.norm", "final_norm"),
    }
    if not model.tie_embeddings:
        full["head.weight"] = state["lm_head.weight"]
    for index in range(model.num_layers):
        source, target = f"model.layers.{index}", f"layers.{index}"
        attention, mlp = f"{source}.self_attn", f"{source}.mlp"
        full |= affine(state, f"{source}.input_layernorm", f"{target}.attention_norm")
        full |= affine(state, f"{source}.post_attention_layernorm", f"{target}.mlp_norm")
        projections = (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj", f"{attention}.o_proj")
        full |= self_attention(state, projections, f"{target}.attention", model)
        full |= gated_mlp(state, (f"{mlp}.gate_proj", f"{mlp}.up_proj", f"{mlp}.down_proj"), f"{target}.mlp")
    return full
