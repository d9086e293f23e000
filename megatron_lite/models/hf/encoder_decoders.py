"""Encoder-decoders: T5 and BART."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_lite.config.derived import complete_model
from megatron_lite.config.schema import ModelConfig
from megatron_lite.models.hf.parts import affine, cross_attention, gated_mlp, self_attention


def from_t5(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Of transformers' T5ForConditionalGeneration: v1.0, and v1.1 with its gated MLP and its own head."""
    full = {"embedding.weight": state["shared.weight"]}
    if not model.tie_embeddings:
        full["head.weight"] = state["lm_head.weight"]
    for stack, num_layers in _stacks(model).items():
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        full[f"{stack}.relative_bias.weight"] = state[table]
        full |= affine(state, f"{stack}.final_layer_norm", f"{stack}.final_norm")
        for index in range(num_layers):
            full |= _t5_layer(state, f"{stack}.block.{index}.layer", f"{stack}.layers.{index}", model)
    return full


def from_bart(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Of transformers' BartForConditionalGeneration."""
    full = {"embedding.weight": state["model.shared.weight"]}
    if not model.tie_embeddings:
        full["head.weight"] = state["lm_head.weight"]
    for stack, num_layers in _stacks(model).items():
        full[f"{stack}.position_embedding.weight"] = state[f"model.{stack}.embed_positions.weight"]
        full |= affine(state, f"model.{stack}.layernorm_embedding", f"{stack}.embedding_norm")
        for index in range(num_layers):
            full |= _bart_layer(state, f"model.{stack}.layers.{index}", f"{stack}.layers.{index}", model)
    return full


def _stacks(model: ModelConfig) -> dict[str, int]:
    """Layers of each stack."""
    decoder_layers = complete_model(model).num_decoder_layers
    assert decoder_layers is not None  # of an encoder_decoder
    return {"encoder": model.num_layers, "decoder": decoder_layers}


def _t5_layer(state: Mapping[str, Tensor], source: str, target: str, model: ModelConfig) -> dict[str, Tensor]:
    """`source`: its parts are numbered, self-attention, in a decoder cross-attention, MLP."""

    def projections(attention: str) -> tuple[str, str, str, str]:
        return f"{attention}.q", f"{attention}.k", f"{attention}.v", f"{attention}.o"

    full = self_attention(state, projections(f"{source}.0.SelfAttention"), f"{target}.attention", model)
    full |= affine(state, f"{source}.0.layer_norm", f"{target}.attention_norm")
    last = 1
    if f"{source}.1.EncDecAttention.q.weight" in state:
        full |= cross_attention(state, projections(f"{source}.1.EncDecAttention"), f"{target}.cross_attention")
        full |= affine(state, f"{source}.1.layer_norm", f"{target}.cross_attention_norm")
        last = 2
    mlp = f"{source}.{last}.DenseReluDense"
    full |= affine(state, f"{source}.{last}.layer_norm", f"{target}.mlp_norm")
    if model.activation.is_gated:
        return full | gated_mlp(state, (f"{mlp}.wi_0", f"{mlp}.wi_1", f"{mlp}.wo"), f"{target}.mlp")
    return full | affine(state, f"{mlp}.wi", f"{target}.mlp.up") | affine(state, f"{mlp}.wo", f"{target}.mlp.down")


def _bart_layer(state: Mapping[str, Tensor], source: str, target: str, model: ModelConfig) -> dict[str, Tensor]:
    def projections(attention: str) -> tuple[str, str, str, str]:
        return f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj", f"{attention}.out_proj"

    full = self_attention(state, projections(f"{source}.self_attn"), f"{target}.attention", model)
    full |= affine(state, f"{source}.self_attn_layer_norm", f"{target}.attention_norm")
    if f"{source}.encoder_attn.q_proj.weight" in state:
        full |= cross_attention(state, projections(f"{source}.encoder_attn"), f"{target}.cross_attention")
        full |= affine(state, f"{source}.encoder_attn_layer_norm", f"{target}.cross_attention_norm")
    full |= affine(state, f"{source}.fc1", f"{target}.mlp.up")
    full |= affine(state, f"{source}.fc2", f"{target}.mlp.down")
    return full | affine(state, f"{source}.final_layer_norm", f"{target}.mlp_norm")
