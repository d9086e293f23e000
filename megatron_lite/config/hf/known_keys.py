"""Keys of config.json that do not change what a model computes, and keys that indicate another family."""

from __future__ import annotations

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
