"""Settings of the model. A part of `schema.RunConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite.config import ranges, texts
from megatron_lite.config import resume_effects as effects
from megatron_lite.config.choices import (
    Activation,
    Architecture,
    CheckInit,
    InitScheme,
    Normalization,
    NormPlacement,
    PositionEmbedding,
)
from megatron_lite.config.setting import SAFE, setting


@dataclass
class ModelConfig:
    """A transformer; GPT-2, LLaMA, BERT, RoBERTa, T5 and BART differ only in these settings."""

    name: str = setting("gpt_tiny", text=texts.label, resume=SAFE)
    """Label for run folders and plots."""
    init_from: str | None = setting(None, text=texts.path, resume=effects.FIRST_WEIGHTS)
    """Weights to start from: a Hugging Face folder (or hub name) with safetensors, or one of our checkpoints. They also
    set the model's settings, and data.tokenizer unless it is given; None = random initialisation."""
    check_init: CheckInit = setting(CheckInit.auto, resume=SAFE)
    """Before the first step, compare logits of the init_from weights with those that transformers computes from the
    same folder: `auto` if it is installed and the model fits in this machine's memory, `always` (also accepts a
    config.json with keys that we do not know), or `never`."""
    family: str | None = setting(None, text=texts.line, resume=effects.NAMES)  # and by `family_computes_the_model`
    """transformers' model_type under whose names checkpoints are saved, where several compute the same (llama and
    mistral); must compute what the other settings say. None = that of the weights in init_from, else the first one."""
    architecture: Architecture = setting(Architecture.decoder, resume=effects.SHAPES)
    """Which positions attend to which: one stack of causal or of bidirectional layers, or two stacks."""
    num_layers: int = setting(4, range=ranges.LAYERS, resume=effects.SHAPES)
    """Layers of the single stack, or of the encoder."""
    num_decoder_layers: int | None = setting(None, range=ranges.LAYERS, resume=effects.SHAPES)
    """Layers of the decoder of an encoder_decoder; None = num_layers."""
    hidden_size: int = setting(128, range=ranges.WIDTH, resume=effects.SHAPES)
    """Width of the residual stream."""
    num_attention_heads: int = setting(4, range=ranges.HEADS, resume=effects.SHAPES)
    """Query heads of each attention."""
    num_query_groups: int | None = setting(None, range=ranges.HEADS, resume=effects.SHAPES)
    """Key/value heads; None = one per attention head (multi-head), 1 = multi-query."""
    head_size: int | None = setting(None, range=ranges.HEADS, resume=effects.SHAPES)
    """Channels of one head; None = hidden_size / num_attention_heads."""
    ffn_hidden_size: int | None = setting(None, range=ranges.INNER_WIDTH, resume=effects.SHAPES)
    """Inner width of the MLP; None = 4 x hidden_size, or 8/3 x hidden_size rounded up to 64 for SwiGLU."""
    max_position_embeddings: int = setting(1024, range=ranges.LENGTH, resume=effects.SHAPES)
    """Longest sequence: size of the learned position table, upper bound of data.seq_length."""
    vocab_size: int | None = setting(None, range=ranges.VOCABULARY_OR_NULL, resume=effects.SHAPES)
    """True vocabulary; None = that of the tokenizer. Padded rows never take part in the loss."""
    vocab_pad_multiple: int = setting(128, range=ranges.PADDING, resume=SAFE)  # checkpoints contain no padding
    """The embedding has a multiple of this x tensor_parallel_size rows (Megatron's make-vocab-size-divisible-by)."""
    normalization: Normalization = setting(Normalization.layernorm, resume=effects.SHAPES)
    """Kind of all norms."""
    norm_placement: NormPlacement = setting(NormPlacement.pre, resume=effects.SHAPES)
    """Where the norms of a block are."""
    norm_epsilon: float = setting(1e-5, range=ranges.SMALL, resume=effects.COMPUTATION)
    """Added to the variance, or mean square, under the square root of each norm."""
    embedding_norm: bool = setting(False, resume=effects.SHAPES)
    """Normalise the sum of the embeddings (BERT, RoBERTa, BART)."""
    activation: Activation = setting(Activation.gelu_tanh, resume=effects.COMPUTATION)
    """Activation of the MLP; swiglu and geglu are gated, with a third matrix."""
    position_embedding: PositionEmbedding = setting(PositionEmbedding.learned, resume=effects.SHAPES)
    """How the model encodes the positions of tokens."""
    position_offset: int = setting(0, range=ranges.OFFSET, resume=effects.SHAPES)
    """Unused rows of the learned position table before position 0 (RoBERTa, BART: 2)."""
    rotary_base: float = setting(10000.0, range=ranges.ROTARY_BASE, resume=effects.COMPUTATION)
    """position_embedding=rotary: base of the wavelengths (theta)."""
    relative_buckets: int = setting(32, range=ranges.BUCKETS, resume=effects.SHAPES)
    """position_embedding=relative: number of distance buckets; in an encoder half of them for each direction."""
    relative_max_distance: int = setting(128, range=ranges.LENGTH, resume=effects.COMPUTATION)
    """position_embedding=relative: all distances from here on share a bucket."""
    num_segments: int = setting(0, range=ranges.OFFSET, resume=effects.SHAPES)
    """Rows of the segment (token type) table; 0 = no such table. BERT 2, RoBERTa 1."""
    attention_bias: bool = setting(True, resume=effects.SHAPES)
    """Biases of the four attention projections."""
    attention_scale: bool = setting(True, resume=effects.COMPUTATION)
    """Divide attention scores by sqrt(head_size); T5 does not."""
    mlp_bias: bool = setting(True, resume=effects.SHAPES)
    """Biases of the matrices of the MLP."""
    tie_embeddings: bool = setting(True, resume=effects.SHAPES)
    """The output head uses the word embedding's weight."""
    scale_tied_head: bool = setting(False, resume=effects.COMPUTATION)
    """Multiply by hidden_size^-0.5 before a tied head (T5 v1.0)."""
    head_transform: bool = setting(False, resume=effects.SHAPES)
    """A dense layer, the activation and a norm before the head (BERT, RoBERTa)."""
    head_bias: bool = setting(False, resume=effects.SHAPES)
    """A bias on the logits (BERT, RoBERTa)."""
    embedding_dropout: float = setting(0.0, range=ranges.FRACTION, resume=effects.DROPOUT)
    """On the sum of the embeddings."""
    attention_dropout: float = setting(0.0, range=ranges.FRACTION, resume=effects.DROPOUT)
    """On attention probabilities."""
    hidden_dropout: float = setting(0.0, range=ranges.FRACTION, resume=effects.DROPOUT)
    """On the output of attention and MLP, before the residual sum."""
    ffn_dropout: float = setting(0.0, range=ranges.FRACTION, resume=effects.DROPOUT)
    """Inside the MLP, between the activation and the last matrix (T5)."""
    final_dropout: float = setting(0.0, range=ranges.FRACTION, resume=effects.DROPOUT)
    """On the output of each stack, after its last norm (T5)."""
    init: InitScheme = setting(InitScheme.normal, resume=effects.FIRST_WEIGHTS)
    """How the weights are initialised."""
    init_std: float = setting(0.02, range=ranges.INIT_STD, resume=effects.FIRST_WEIGHTS)
    """Standard deviation for init=normal and init=plain."""
