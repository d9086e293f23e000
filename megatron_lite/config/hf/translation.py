"""The words of transformers' config.json for our settings: tables that are read in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lite.config.hf.families import BART, BERT, GPT2, LLAMA, ROBERTA, T5
from megatron_lite.config.schema import Activation

_ACTIVATIONS = {
    "gelu_new": Activation.gelu_tanh,
    "gelu_pytorch_tanh": Activation.gelu_tanh,
    "gelu_fast": Activation.gelu_tanh,
    "gelu": Activation.gelu,
    "relu": Activation.relu,
}
_GATES = {
    "silu": Activation.swiglu,
    "swish": Activation.swiglu,
    "gelu_pytorch_tanh": Activation.geglu,
    "gelu_new": Activation.geglu,
}
_T5_ACTIVATIONS = {
    "relu": Activation.relu,
    "gelu": Activation.gelu,
    "gelu_new": Activation.gelu_tanh,
    "gated-gelu": Activation.geglu,  # of gelu_new, for its history
    "gated-gelu_new": Activation.geglu,
    "gated-silu": Activation.swiglu,
}


@dataclass(frozen=True)
class Key:
    """A key of config.json that holds a value as we hold it."""

    fields: tuple[str, ...]
    """Of ModelConfig. The first one is written; all are read."""
    default: Any
    """What transformers takes where the key is missing."""


@dataclass(frozen=True)
class Words:
    """How the config.json of a family says what our settings say."""

    keys: Mapping[str, Key]
    activation_key: str
    activations: Mapping[str, Activation]
    """The first word for one of ours is the one that is written."""
    default_activation: str
    demands: Mapping[str, tuple[Any, ...]]
    """Keys that change the computation -> the values that we compute; the first is that of a missing key."""


def _keys(**words: tuple[str, Any] | tuple[tuple[str, ...], Any]) -> dict[str, Key]:
    return {
        key: Key((fields,) if isinstance(fields, str) else fields, default) for key, (fields, default) in words.items()
    }


_NO_DECODER: dict[str, tuple[Any, ...]] = {"is_decoder": (False,), "add_cross_attention": (False,)}
_NO_WINDOW: dict[str, tuple[Any, ...]] = {"sliding_window": (None,), "use_sliding_window": (False,)}

_BERT_KEYS = _keys(
    num_hidden_layers=("num_layers", 12),
    hidden_size=("hidden_size", 768),
    num_attention_heads=("num_attention_heads", 12),
    intermediate_size=("ffn_hidden_size", 3072),
    max_position_embeddings=("max_position_embeddings", 512),
    type_vocab_size=("num_segments", 2),
    layer_norm_eps=("norm_epsilon", 1e-12),
    tie_word_embeddings=("tie_embeddings", True),
    hidden_dropout_prob=(("hidden_dropout", "embedding_dropout"), 0.1),
    attention_probs_dropout_prob=("attention_dropout", 0.1),
)
_BERT_DEMANDS: dict[str, tuple[Any, ...]] = {"position_embedding_type": ("absolute",), **_NO_DECODER}

WORDS: dict[str, Words] = {
    GPT2.model_type: Words(
        keys=_keys(
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
        activations=_ACTIVATIONS,
        default_activation="gelu_new",
        demands={"scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    ),
    LLAMA.model_type: Words(
        keys=_keys(
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
        demands={"partial_rotary_factor": (1.0, 1, None), **_NO_WINDOW},
    ),
    BERT.model_type: Words(_BERT_KEYS, "hidden_act", _ACTIVATIONS, "gelu", _BERT_DEMANDS),
    ROBERTA.model_type: Words(_BERT_KEYS, "hidden_act", {"gelu": Activation.gelu}, "gelu", _BERT_DEMANDS),
    T5.model_type: Words(
        keys=_keys(
            num_layers=("num_layers", 6),
            num_decoder_layers=("num_decoder_layers", None),
            d_model=("hidden_size", 512),
            num_heads=("num_attention_heads", 8),
            d_kv=("head_size", 64),
            d_ff=("ffn_hidden_size", 2048),
            n_positions=("max_position_embeddings", 512),  # transformers' T5 has no bound, and its files tell this one
            relative_attention_num_buckets=("relative_buckets", 32),
            relative_attention_max_distance=("relative_max_distance", 128),
            layer_norm_epsilon=("norm_epsilon", 1e-6),
            dropout_rate=(
                ("hidden_dropout", "embedding_dropout", "attention_dropout", "ffn_dropout", "final_dropout"),
                0.1,
            ),
        ),
        activation_key="feed_forward_proj",
        activations=_T5_ACTIVATIONS,
        default_activation="relu",
        demands={},
    ),
    BART.model_type: Words(
        keys=_keys(
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
        activations=_ACTIVATIONS,
        default_activation="gelu",
        demands={"scale_embedding": (False,)},
    ),
}
