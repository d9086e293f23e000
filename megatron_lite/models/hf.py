"""Weights of Hugging Face models under our global names, as full tensors.

Pure functions of a state dict. They only rename, transpose and join, so they map a dictionary of gradients as well.

Shapes: h hidden, n attention heads, g query groups, d head size, f inner channels of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_lite.config.derived import complete_model
from megatron_lite.config.schema import ModelConfig


def from_gpt2(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Of transformers' GPT2LMHeadModel, whose Conv1D layers store [in, out]."""
    model = complete_model(model)
    full = {
        "embedding.weight": state["transformer.wte.weight"],
        "position_embedding.weight": state["transformer.wpe.weight"],
        **_affine(state, "transformer.ln_f", "final_norm"),
    }
    if not model.tie_embeddings:
        full["head.weight"] = state["lm_head.weight"]
    for index in range(model.num_layers):
        source, target = f"transformer.h.{index}", f"layers.{index}"
        full |= _affine(state, f"{source}.ln_1", f"{target}.attention_norm")
        full |= _affine(state, f"{source}.ln_2", f"{target}.mlp_norm")
        full |= _affine(state, f"{source}.attn.c_proj", f"{target}.attention.projection", transpose=True)
        full |= _affine(state, f"{source}.mlp.c_fc", f"{target}.mlp.up", transpose=True)
        full |= _affine(state, f"{source}.mlp.c_proj", f"{target}.mlp.down", transpose=True)
        fused = _affine(state, f"{source}.attn.c_attn", "", transpose=True)
        for kind, (query, key, value) in ((kind, rows.chunk(3)) for kind, rows in fused.items()):
            full[f"{target}.attention.qkv{kind}"] = fuse_qkv(query, key, value, model)
    return full


def from_llama(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Of transformers' LlamaForCausalLM."""
    model = complete_model(model)
    full = {
        "embedding.weight": state["model.embed_tokens.weight"],
        **_affine(state, "model.norm", "final_norm"),
    }
    if not model.tie_embeddings:
        full["head.weight"] = state["lm_head.weight"]
    for index in range(model.num_layers):
        source, target = f"model.layers.{index}", f"layers.{index}"
        full |= _affine(state, f"{source}.input_layernorm", f"{target}.attention_norm")
        full |= _affine(state, f"{source}.post_attention_layernorm", f"{target}.mlp_norm")
        full |= _affine(state, f"{source}.self_attn.o_proj", f"{target}.attention.projection")
        full |= _affine(state, f"{source}.mlp.down_proj", f"{target}.mlp.down")
        q, k, v = (_affine(state, f"{source}.self_attn.{part}_proj", "") for part in "qkv")
        full |= {f"{target}.attention.qkv{kind}": fuse_qkv(q[kind], k[kind], v[kind], model) for kind in q}
        gate, up = (_affine(state, f"{source}.mlp.{part}_proj", "") for part in ("gate", "up"))
        full |= {f"{target}.mlp.gate_up{kind}": torch.stack([gate[kind], up[kind]]) for kind in gate}
    return full


def fuse_qkv(query: Tensor, key: Tensor, value: Tensor, model: ModelConfig) -> Tensor:
    """[n d, ...], [g d, ...], [g d, ...] -> [g (n/g + 2) d, ...], ordered as `models.attention` reads it."""
    groups = complete_model(model).num_query_groups
    by_group = [part.unflatten(0, (groups, -1)) for part in (query, key, value)]
    return torch.cat(by_group, dim=1).flatten(0, 1)


def _affine(state: Mapping[str, Tensor], source: str, target: str, *, transpose: bool = False) -> dict[str, Tensor]:
    """Weight and, where there is one, bias of the module `source`, as "<target>.weight" and "<target>.bias"."""
    weight = state[f"{source}.weight"]
    found = {f"{target}.weight": weight.t() if transpose else weight}
    if f"{source}.bias" in state:
        found[f"{target}.bias"] = state[f"{source}.bias"]
    return found
