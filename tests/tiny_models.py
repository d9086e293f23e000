"""Small settings of every model family, and the fields that feed them: the one list that all tests of models use."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_lite.config.schema import (
    Activation,
    Architecture,
    InitScheme,
    ModelConfig,
    Normalization,
    NormPlacement,
    PositionEmbedding,
)
from megatron_lite.models.fields import Field

LENGTH, DECODER_LENGTH = 24, 16
TOKENS = Field("tokens", LENGTH)
LENGTHS = Field("lengths")
SEGMENTS = Field("segments", LENGTH)
DECODER_TOKENS = Field("decoder_tokens", DECODER_LENGTH)
PAIR = (TOKENS, DECODER_TOKENS)

GPT2 = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, max_position_embeddings=LENGTH, vocab_pad_multiple=8
)
LLAMA = replace(
    GPT2,
    normalization=Normalization.rmsnorm,
    activation=Activation.swiglu,
    position_embedding=PositionEmbedding.rotary,
    attention_bias=False,
    mlp_bias=False,
    tie_embeddings=False,
)
BERT = replace(
    GPT2,
    architecture=Architecture.encoder,
    norm_placement=NormPlacement.post,
    norm_epsilon=1e-12,
    embedding_norm=True,
    num_segments=2,
    activation=Activation.gelu,
    head_transform=True,
    head_bias=True,
    init=InitScheme.plain,
)
ROBERTA = replace(BERT, norm_epsilon=1e-5, position_offset=2, num_segments=1)
BART = replace(
    BERT,
    architecture=Architecture.encoder_decoder,
    num_decoder_layers=3,
    norm_epsilon=1e-5,
    position_offset=2,
    num_segments=0,
    head_transform=False,
    head_bias=False,
)
T5 = replace(
    LLAMA,
    architecture=Architecture.encoder_decoder,
    num_decoder_layers=3,
    head_size=16,
    ffn_hidden_size=48,
    norm_epsilon=1e-6,
    activation=Activation.relu,
    position_embedding=PositionEmbedding.relative,
    relative_buckets=8,
    relative_max_distance=12,
    attention_scale=False,
    tie_embeddings=True,
    scale_tied_head=True,
    init=InitScheme.t5,
)
T5_V1_1 = replace(T5, activation=Activation.geglu, tie_embeddings=False, scale_tied_head=False)


@dataclass(frozen=True)
class TinyModel:
    """A model, and how it is fed."""

    model: ModelConfig
    inputs: tuple[Field, ...] = (TOKENS,)
    """All that the model can take; LENGTHS, of padded inputs, may be left out."""
    next_sentence: bool = False
    layers_of: str | None = None
    """The model that has the same layers: expensive tests, of several ranks, take only that one."""

    @property
    def unpadded_inputs(self) -> tuple[Field, ...]:
        return tuple(field for field in self.inputs if field != LENGTHS)


MODELS = {
    "gpt2": TinyModel(GPT2),
    "llama": TinyModel(replace(LLAMA, num_query_groups=2)),
    "mistral": TinyModel(replace(LLAMA, family="mistral", num_query_groups=2, head_size=16), layers_of="llama"),
    "bert": TinyModel(BERT, (TOKENS, SEGMENTS, LENGTHS), next_sentence=True),
    "bert_without_pairs": TinyModel(BERT, (TOKENS, SEGMENTS, LENGTHS), layers_of="bert"),
    "roberta": TinyModel(ROBERTA, (TOKENS, LENGTHS)),
    "t5": TinyModel(T5, (*PAIR, LENGTHS)),
    "t5_v1_1": TinyModel(T5_V1_1, (*PAIR, LENGTHS)),
    "bart": TinyModel(BART, (*PAIR, LENGTHS)),
}
"""Every model of the suite, at least one of each family. A new one is in all tests that take these: of logits and
gradients against transformers, on one rank and on two; of parameter counts; of names, shapes and forms of tensors."""
