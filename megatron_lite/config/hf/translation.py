"""How transformers' config.json expresses our settings: tables that are read in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    "gated-gelu": Activation.geglu,  # for historical reasons, this means gelu_new
    "gated-gelu_new": Activation.geglu,
    "gated-silu": Activation.swiglu,
}


@dataclass(frozen=True)
class Key:
    """A key of config.json whose value has the same form as ours."""

    fields: tuple[str, ...]
    """Fields of ModelConfig. The first one is written; all are read."""
    default: Any
    """What transformers assumes if the key is missing."""
    least: int = 1
    """Smallest value of an integer."""


@dataclass(frozen=True)
class Words:
    """How a family's config.json expresses our settings."""

    keys: Mapping[str, Key]
    activation_key: str
    activations: Mapping[str, Activation]
    """The first name for one of our activations is the one that is written."""
    default_activation: str
    demands: Mapping[str, tuple[Any, ...]]
    """Keys that change the computation -> the values that we support; the first one is that of a missing key."""
    architectures: tuple[str, ...]
    """transformers' classes of this model type whose weights we can load, including those without a head."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names that transformers accepts for a key."""
    harmless: frozenset[str] = frozenset()
    """Additional keys in the family's files that do not affect the logits."""

    def knows(self, key: str) -> bool:
        """Whether we know how a key of config.json affects the logits, if at all."""
        read = key in self.keys or key in self.demands or key in self.aliases or key == self.activation_key
        return read or key in self.harmless or key in HARMLESS or key.startswith(HARMLESS_BEGINNINGS)


def _keys(**words: tuple[str, Any] | tuple[tuple[str, ...], Any]) -> dict[str, Key]:
    return {
        key: Key((fields,) if isinstance(fields, str) else fields, default, least=0 if key == "type_vocab_size" else 1)
        for key, (fields, default) in words.items()
    }


HARMLESS_BEGINNINGS = ("_", "unsloth", "transformers.js")
HARMLESS = frozenset(
    {
        # what the model is, where it came from, and how its files are read
        "architectures", "dtype", "finetuning_task", "ignore_keys_at_rope_validation", "model_type",
        "name_or_path", "prefix", "problem_type", "task_specific_params", "tokenizer_class", "torch_dtype",
        "transformers_version", "use_bfloat16", "vocab_size",
        # training
        "gradient_checkpointing", "initializer_factor", "initializer_range", "init_std",
        # what a call returns, and how fast
        "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "output_past", "return_dict",
        "tf_legacy_loss", "torchscript", "use_cache",
        # token IDs
        "bos_token_id", "decoder_start_token_id", "eos_token_id", "forced_bos_token_id", "forced_eos_token_id",
        "pad_token_id", "sep_token_id",
        # generation
        "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
        "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "length_penalty", "max_length",
        "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
        "output_scores", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
        "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
        # classification heads, which no model here has
        "classif_dropout", "classifier_dropout", "id2label", "label2id", "num_labels",
    }
)  # fmt: skip
"""Keys of any config.json that do not affect the logits."""
OF_OTHER_FAMILIES = frozenset(
    {
        "attention_multiplier",
        "attn_logit_softcapping",
        "clip_qkv",
        "dim_model_base",
        "embedding_multiplier",
        "final_logit_softcapping",
        "hidden_activation",
        "layer_types",
        "logit_scale",
        "logits_scaling",
        "no_rope_layers",
        "query_pre_attn_scalar",
        "residual_multiplier",
        "rope_local_base_freq",
        "scale_depth",
        "scale_emb",
        "sliding_window_pattern",
        "use_bidirectional_attention",
        "use_qk_norm",
    }
)
"""Keys that indicate another family (Gemma, Granite, OLMo, Cohere, MiniCPM, SmolLM3), whatever their value: Gemma's has
null for `use_bidirectional_attention`, and scales its embeddings. transformers ignores them under another
model_type."""
TOKENIZERS_OF_OTHERS = {"llama": ("Gemma",)}
"""Model type -> prefixes of tokenizer classes that belong to models with the same tensors but another function."""
_EVERYWHERE: dict[str, tuple[Any, ...]] = {
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
    "cross_attention_hidden_size": (None,),
}
_CLASSIFIERS = frozenset(
    {
        "directionality",
        "pooler_fc_size",
        "pooler_num_attention_heads",
        "pooler_num_fc_layers",
        "pooler_size_per_head",
        "pooler_type",
    }
)
_CAUSAL: dict[str, tuple[Any, ...]] = {**_EVERYWHERE, "is_causal": (True,)}
_PAIRS = ("is_encoder_decoder", "is_decoder")  # a decoder, and an encoder-decoder, need no such key

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
_BERT_DEMANDS: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute",),
    "is_encoder_decoder": (False,),
    **_NO_DECODER,
    **_EVERYWHERE,
}

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
        demands={
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "is_encoder_decoder": (False,),
            **_CAUSAL,
        },
        architectures=("GPT2LMHeadModel", "GPT2Model", "GPT2DoubleHeadsModel"),
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
        demands={
            "partial_rotary_factor": (1.0, None),
            "add_cross_attention": (False,),
            "is_encoder_decoder": (False,),
            **_NO_WINDOW,
            **_CAUSAL,
        },
        architectures=("LlamaForCausalLM", "LlamaModel", "LLaMAForCausalLM"),
        harmless=frozenset(
            {
                "is_decoder",
                "is_llama_config",
                "max_sequence_length",
                "max_window_layers",  # which layers have a window, if there is one
                "pretraining_tp",  # the same sums in parts
                "rope_interleaved",  # of the program that trained SmolLM; its weights are converted
                "rope_parameters",  # these three are read outside of the table
                "rope_scaling",
                "rope_theta",
            }
        ),
    ),
    BERT.model_type: Words(
        _BERT_KEYS,
        "hidden_act",
        _ACTIVATIONS,
        "gelu",
        _BERT_DEMANDS,
        architectures=("BertForPreTraining", "BertForMaskedLM", "BertModel", "BertForNextSentencePrediction"),
        harmless=_CLASSIFIERS,
    ),
    ROBERTA.model_type: Words(
        _BERT_KEYS,
        "hidden_act",
        {"gelu": Activation.gelu},
        "gelu",
        _BERT_DEMANDS,
        architectures=("RobertaForMaskedLM", "RobertaModel"),
        harmless=_CLASSIFIERS,
    ),
    T5.model_type: Words(
        keys=_keys(
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
        activations=_T5_ACTIVATIONS,
        default_activation="relu",
        demands=_CAUSAL,
        architectures=("T5ForConditionalGeneration", "T5WithLMHeadModel", "T5Model"),
        aliases={
            "hidden_size": "d_model",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_heads",
            "head_dim": "d_kv",
        },
        harmless=frozenset(
            {
                *_PAIRS,
                "tie_word_embeddings",  # these four are read outside of the table
                "scale_decoder_outputs",
                "dense_act_fn",
                "is_gated_act",
            }
        ),
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
        demands={"scale_embedding": (False,), **_CAUSAL},
        architectures=("BartForConditionalGeneration", "BartModel"),
        aliases={
            "hidden_size": "d_model",
            "num_hidden_layers": "encoder_layers",
            "num_attention_heads": "encoder_attention_heads",
        },
        harmless=frozenset(
            {
                *_PAIRS,
                "decoder_attention_heads",  # these two are read outside of the table
                "decoder_ffn_dim",
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
    ),
}
