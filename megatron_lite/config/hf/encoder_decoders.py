"""Encoder-decoder families."""

from __future__ import annotations

from megatron_lite.config.hf.family import Family, keys
from megatron_lite.config.hf.parts import EQUAL_STACKS, T5_HEAD
from megatron_lite.config.hf.shared import ACTIVATIONS, ADDITIVE, CAUSAL, PLAIN_HEAD, POST_NORM
from megatron_lite.config.hf.tensors import Place, inside, module, split_qkv, stacked
from megatron_lite.config.schema import Activation, Architecture, Normalization, NormPlacement, PositionEmbedding

_PAIRS = ("is_encoder_decoder", "is_decoder")  # an encoder-decoder needs no such key


def _t5_stack(stack: str) -> dict[str, Place]:
    """The parts of a layer are numbered: self-attention, cross-attention in a decoder, MLP."""
    decoder = stack == "decoder"
    cross = {
        "cross_attention.query": module("1.EncDecAttention.q"),
        "cross_attention.key_value": stacked("1.EncDecAttention.k", "1.EncDecAttention.v"),
        "cross_attention.projection": module("1.EncDecAttention.o"),
        "cross_attention_norm": module("1.layer_norm"),
    }
    mlp = 2 if decoder else 1
    layer = {
        "attention.qkv": split_qkv("0.SelfAttention.q", "0.SelfAttention.k", "0.SelfAttention.v"),
        "attention.projection": module("0.SelfAttention.o"),
        "attention_norm": module("0.layer_norm"),
        **(cross if decoder else {}),
        "mlp.up": module(f"{mlp}.DenseReluDense.wi"),
        "mlp.gate_up": stacked(f"{mlp}.DenseReluDense.wi_0", f"{mlp}.DenseReluDense.wi_1"),
        "mlp.down": module(f"{mlp}.DenseReluDense.wo"),
        "mlp_norm": module(f"{mlp}.layer_norm"),
    }
    return {
        f"{stack}.relative_bias": module(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"),
        **inside(f"{stack}.layers.*", f"{stack}.block.*.layer", layer),
        f"{stack}.final_norm": module(f"{stack}.final_layer_norm"),
    }


def _bart_stack(stack: str) -> dict[str, Place]:
    cross = {
        "cross_attention.query": module("encoder_attn.q_proj"),
        "cross_attention.key_value": stacked("encoder_attn.k_proj", "encoder_attn.v_proj"),
        "cross_attention.projection": module("encoder_attn.out_proj"),
        "cross_attention_norm": module("encoder_attn_layer_norm"),
    }
    layer = {
        "attention.qkv": split_qkv("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.projection": module("self_attn.out_proj"),
        "attention_norm": module("self_attn_layer_norm"),
        **(cross if stack == "decoder" else {}),
        "mlp.up": module("fc1"),
        "mlp.down": module("fc2"),
        "mlp_norm": module("final_layer_norm"),
    }
    return {
        f"{stack}.position_embedding": module(f"model.{stack}.embed_positions"),
        f"{stack}.embedding_norm": module(f"model.{stack}.layernorm_embedding"),
        **inside(f"{stack}.layers.*", f"model.{stack}.layers.*", layer),
    }


T5 = Family(
    "t5",
    "T5ForConditionalGeneration",
    ("T5ForConditionalGeneration", "T5WithLMHeadModel", "T5Model"),
    fixed={
        "architecture": (Architecture.encoder_decoder,),
        "normalization": (Normalization.rmsnorm,),
        "norm_placement": (NormPlacement.pre,),
        "embedding_norm": (False,),
        "position_embedding": (PositionEmbedding.relative,),
        "num_segments": (0,),
        "attention_bias": (False,),
        "attention_scale": (False,),
        "mlp_bias": (False,),
        **PLAIN_HEAD,
    },
    keys=keys(
        num_layers=("num_layers", 6),
        num_decoder_layers=("num_decoder_layers", None),
        d_model=("hidden_size", 512),
        num_heads=("num_attention_heads", 8),
        d_kv=("head_size", 64),
        d_ff=("ffn_hidden_size", 2048),
        n_positions=("max_position_embeddings", 512),  # transformers' T5 has no limit, but its files have this one
        relative_attention_num_buckets=("relative_buckets", 32),
        relative_attention_max_distance=("relative_max_distance", 128),
        layer_norm_epsilon=("norm_epsilon", 1e-6),
        dropout_rate=(
            ("hidden_dropout", "embedding_dropout", "attention_dropout", "ffn_dropout", "final_dropout"),
            0.1,
        ),
    ),
    activation_key="feed_forward_proj",
    activations={
        "relu": Activation.relu,
        "gelu": Activation.gelu,
        "gelu_new": Activation.gelu_tanh,
        "gated-gelu": Activation.geglu,  # for historical reasons, this means gelu_new
        "gated-gelu_new": Activation.geglu,
        "gated-silu": Activation.swiglu,
    },
    default_activation="relu",
    vocab_size=32128,
    tokens={"eos_token_id": ("eos", "eod"), "pad_token_id": ("pad",), "decoder_start_token_id": ("pad",)},
    tensors={
        "embedding": module("shared"),
        **_t5_stack("encoder"),
        **_t5_stack("decoder"),
        "head": module("lm_head"),
    },
    parts=(T5_HEAD,),
    demands=CAUSAL,
    constants={"is_encoder_decoder": True},
    aliases={
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "head_dim": "d_kv",
    },
    harmless=frozenset(_PAIRS),
    copies=("encoder.embed_tokens", "decoder.embed_tokens"),
    ignored=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)
BART = Family(
    "bart",
    "BartForConditionalGeneration",
    ("BartForConditionalGeneration", "BartModel"),
    fixed={
        **ADDITIVE,
        **POST_NORM,
        "architecture": (Architecture.encoder_decoder,),
        "norm_epsilon": (1e-5,),  # torch's default: its config.json has no key for it
        "position_offset": (2,),
        "num_segments": (0,),
        "tie_embeddings": (True,),  # an untied one has three word tables, and we have one
        **PLAIN_HEAD,
    },
    keys=keys(
        encoder_layers=("num_layers", 12),
        decoder_layers=("num_decoder_layers", 12),
        d_model=("hidden_size", 1024),
        encoder_attention_heads=("num_attention_heads", 16),
        encoder_ffn_dim=("ffn_hidden_size", 4096),
        max_position_embeddings=("max_position_embeddings", 1024),
        tie_word_embeddings=("tie_embeddings", True),
        dropout=(("hidden_dropout", "embedding_dropout"), 0.1),
        attention_dropout=("attention_dropout", 0.0),
        activation_dropout=("ffn_dropout", 0.0),
    ),
    activation_key="activation_function",
    activations=ACTIVATIONS,
    default_activation="gelu",
    vocab_size=50265,
    tokens={
        "bos_token_id": ("bos", "cls"),
        "eos_token_id": ("eos", "sep"),
        "forced_eos_token_id": ("eos", "sep"),
        "pad_token_id": ("pad",),
        "decoder_start_token_id": ("eos", "sep"),
    },
    tensors={
        "embedding": module("model.shared"),
        **_bart_stack("encoder"),
        **_bart_stack("decoder"),
        "head": module("lm_head"),
    },
    parts=(EQUAL_STACKS,),
    demands={"scale_embedding": (False,), **CAUSAL},
    constants={"is_encoder_decoder": True, "scale_embedding": False},
    aliases={
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
        "num_attention_heads": "encoder_attention_heads",
    },
    harmless=frozenset(
        {
            *_PAIRS,
            "decoder_layerdrop",
            "encoder_layerdrop",
            # from fairseq: no class of transformers reads them any more
            "add_bias_logits",
            "add_final_layer_norm",
            "extra_pos_embeddings",
            "normalize_before",
            "normalize_embedding",
            "static_position_embeddings",
        }
    ),
    zeros={"final_logits_bias": (1, "vocab_size")},  # a bias on the logits that is never trained
    copies=("model.encoder.embed_tokens", "model.decoder.embed_tokens"),
    ignored=r"(model\.)?(encoder|decoder)\.version",
)
ENCODER_DECODERS = (
    T5,
    BART,
)
