"""Decoder-only families. `Family.like` makes one of another: docs/extending.md shows it."""

from __future__ import annotations

from typing import Any

from megatron_lite.config.hf.family import REMOVED, Family, keys
from megatron_lite.config.hf.parts import rotary
from megatron_lite.config.hf.shared import ACTIVATIONS, ADDITIVE, CAUSAL, GENERATED, NO_WINDOW, PLAIN_HEAD
from megatron_lite.config.hf.tensors import inside, joined_qkv, module, split_qkv, stacked, transposed
from megatron_lite.config.schema import Activation, Architecture, Normalization, NormPlacement, PositionEmbedding

_GATES = {
    "silu": Activation.swiglu,
    "swish": Activation.swiglu,
    "gelu_pytorch_tanh": Activation.geglu,
    "gelu_new": Activation.geglu,
}
_DECODER: dict[str, tuple[Any, ...]] = {
    "architecture": (Architecture.decoder,),
    "norm_placement": (NormPlacement.pre,),
    "embedding_norm": (False,),
    "num_segments": (0,),
    "scale_tied_head": (False,),
    **PLAIN_HEAD,
}

GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    ("GPT2LMHeadModel", "GPT2Model", "GPT2DoubleHeadsModel"),
    fixed={**ADDITIVE, **_DECODER, "position_offset": (0,)},
    keys=keys(
        n_layer=("num_layers", 12),
        n_embd=("hidden_size", 768),
        n_head=("num_attention_heads", 12),
        n_inner=("ffn_hidden_size", None),
        n_positions=("max_position_embeddings", 1024),
        layer_norm_epsilon=("norm_epsilon", 1e-5),
        scale_attn_weights=("attention_scale", True),
        tie_word_embeddings=("tie_embeddings", True),
        embd_pdrop=("embedding_dropout", 0.1),
        resid_pdrop=("hidden_dropout", 0.1),
        attn_pdrop=("attention_dropout", 0.1),
    ),
    activation_key="activation_function",
    activations=ACTIVATIONS,
    default_activation="gelu_new",
    vocab_size=50257,
    tokens=GENERATED,
    tensors={
        "embedding": module("transformer.wte"),
        "position_embedding": module("transformer.wpe"),
        **inside(
            "layers.*",
            "transformer.h.*",
            {  # transformers' Conv1D layers store [in, out]
                "attention_norm": module("ln_1"),
                "attention.qkv": joined_qkv("attn.c_attn"),
                "attention.projection": transposed("attn.c_proj"),
                "mlp_norm": module("ln_2"),
                "mlp.up": transposed("mlp.c_fc"),
                "mlp.down": transposed("mlp.c_proj"),
            },
        ),
        "final_norm": module("transformer.ln_f"),
        "head": module("lm_head"),
    },
    demands={
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "is_encoder_decoder": (False,),
        **CAUSAL,
    },
    aliases={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    },
    harmless=frozenset(
        {
            "is_decoder",
            "n_ctx",  # in old files: n_positions
            "reorder_and_upcast_attn",  # the same in another order, and in fp32
            "summary_activation",
            "summary_first_dropout",
            "summary_last_dropout",
            "summary_proj_to_labels",
            "summary_type",
            "summary_use_proj",
        }
    ),
    ignored=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",  # the causal mask
)
LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    ("LlamaForCausalLM", "LlamaModel", "LLaMAForCausalLM"),
    fixed={
        **_DECODER,
        "normalization": (Normalization.rmsnorm,),
        "position_embedding": (PositionEmbedding.rotary,),
        "attention_scale": (True,),
    },
    keys=keys(
        num_hidden_layers=("num_layers", 32),
        hidden_size=("hidden_size", 4096),
        num_attention_heads=("num_attention_heads", 32),
        num_key_value_heads=("num_query_groups", None),
        head_dim=("head_size", None),
        intermediate_size=("ffn_hidden_size", 11008),
        max_position_embeddings=("max_position_embeddings", 2048),
        rms_norm_eps=("norm_epsilon", 1e-6),
        attention_bias=("attention_bias", False),
        mlp_bias=("mlp_bias", False),
        tie_word_embeddings=("tie_embeddings", False),
        attention_dropout=("attention_dropout", 0.0),
    ),
    activation_key="hidden_act",
    activations=_GATES,
    default_activation="silu",
    vocab_size=32000,
    tokens=GENERATED,
    tensors={
        "embedding": module("model.embed_tokens"),
        **inside(
            "layers.*",
            "model.layers.*",
            {
                "attention_norm": module("input_layernorm"),
                "attention.qkv": split_qkv("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "attention.projection": module("self_attn.o_proj"),
                "mlp_norm": module("post_attention_layernorm"),
                "mlp.gate_up": stacked("mlp.gate_proj", "mlp.up_proj"),
                "mlp.down": module("mlp.down_proj"),
            },
        ),
        "final_norm": module("model.norm"),
        "head": module("lm_head"),
    },
    parts=(rotary(),),
    demands={
        "partial_rotary_factor": (1.0, None),
        "add_cross_attention": (False,),
        "is_encoder_decoder": (False,),
        **NO_WINDOW,
        **CAUSAL,
    },
    harmless=frozenset(
        {
            "is_decoder",
            "is_llama_config",
            "max_sequence_length",
            "max_window_layers",  # which layers have a window, if there is one
            "pretraining_tp",  # the same sums in parts
            "rope_interleaved",  # of the program that trained SmolLM; its weights are converted
        }
    ),
    heads_divide_hidden=True,
    ignored=r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
    foreign_tokenizers=("Gemma",),
    doubtful={Activation.geglu: "no LLaMA model in transformers has a GELU gate; Gemma has one"},
)
MISTRAL = Family.like(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    architectures=("MistralForCausalLM", "MistralModel"),
    fixed={"attention_bias": (False,), "mlp_bias": (False,)},
    keys={
        "attention_bias": REMOVED,
        "mlp_bias": REMOVED,
        **keys(
            num_key_value_heads=("num_query_groups", 8),
            intermediate_size=("ffn_hidden_size", 14336),
            max_position_embeddings=("max_position_embeddings", 131072),
        ),
    },
    absent={"sliding_window": 4096},
    constants={"sliding_window": None},
    only_if_named=True,
    heads_divide_hidden=False,
    doubtful={Activation.geglu: "no Mistral model in transformers has a GELU gate; Gemma has one"},
)
DECODERS = (
    GPT2,
    LLAMA,
    MISTRAL,
)
