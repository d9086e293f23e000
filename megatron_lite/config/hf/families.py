"""Which model of transformers computes the same as a model of ours, if any.

For each setting that it knows, a family lists the values that it supports (`fixed`), or says that its config.json
holds the value (`free`). A setting that it does not mention, such as one that is new here, must have its default, which
means that the model does not use it: otherwise transformers has no counterpart.

Dropouts and initialisation do not matter here: a trained model does not use them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from megatron_lite.config.keys import as_word
from megatron_lite.config.schema import (
    Activation,
    Architecture,
    ModelConfig,
    Normalization,
    NormPlacement,
    PositionEmbedding,
)


class NoCounterpart(Exception):  # noqa: N818 - a result rather than an error: such a model is saved with our own names
    """transformers has no model with these settings; the text says why."""


_OF_TRAINING = ("name", "init_from", "check_init", "vocab_pad_multiple", "init", "init_std")


def decisive_fields(model: type[ModelConfig] = ModelConfig) -> Iterator[tuple[str, Any]]:
    """Fields that affect the logits (sizes and forms, not how training begins), and their defaults."""
    for field in fields(model):
        if field.name not in _OF_TRAINING and not field.name.endswith("_dropout"):
            yield field.name, field.default


DECISIVE = tuple(name for name, _ in decisive_fields())


@dataclass(frozen=True)
class Family:
    """A kind of model, in transformers' terms and in our settings."""

    model_type: str
    architecture: str
    """The class of transformers that config.json names."""
    script: str
    fixed: Mapping[str, tuple[Any, ...]]
    """Fields of ModelConfig -> the values that the family supports."""
    free: tuple[str, ...] = ()
    """Fields of ModelConfig that its config.json holds, besides those of all families."""
    query_groups: bool = False
    """Heads may share keys and values."""
    free_head_size: bool = False
    """Heads may be wider or narrower than hidden_size / num_attention_heads."""


_OF_ALL = frozenset(
    {
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",  # `_differences` checks these two against the family
        "head_size",
        "ffn_hidden_size",
        "max_position_embeddings",
        "vocab_size",
        "norm_epsilon",
        "tie_embeddings",
    }
)
"""Fields that the config.json of every family holds."""
_READ_WITH: dict[str, Architecture | PositionEmbedding] = {
    "num_decoder_layers": Architecture.encoder_decoder,
    "position_offset": PositionEmbedding.learned,
    "relative_buckets": PositionEmbedding.relative,
    "relative_max_distance": PositionEmbedding.relative,
    "rotary_base": PositionEmbedding.rotary,
}
"""Fields that a model reads only if another field has this value."""
_UNGATED = (Activation.relu, Activation.gelu, Activation.gelu_tanh)
_GATED = (Activation.swiglu, Activation.geglu)
_PLAIN_HEAD: dict[str, tuple[Any, ...]] = {"head_transform": (False,), "head_bias": (False,)}
_ADDITIVE: dict[str, tuple[Any, ...]] = {  # from before rotary positions
    "normalization": (Normalization.layernorm,),
    "position_embedding": (PositionEmbedding.learned,),
    "attention_bias": (True,),
    "mlp_bias": (True,),
    "activation": _UNGATED,
    "scale_tied_head": (False,),
}
_ENCODER: dict[str, tuple[Any, ...]] = {
    **_ADDITIVE,
    "architecture": (Architecture.encoder,),
    "norm_placement": (NormPlacement.post,),
    "embedding_norm": (True,),
    "attention_scale": (True,),
    "head_transform": (True,),
    "head_bias": (True,),
}
_DECODER: dict[str, tuple[Any, ...]] = {
    "architecture": (Architecture.decoder,),
    "norm_placement": (NormPlacement.pre,),
    "embedding_norm": (False,),
    "num_segments": (0,),
    "scale_tied_head": (False,),
    **_PLAIN_HEAD,
}

GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    "pretrain_gpt",
    {**_ADDITIVE, **_DECODER, "position_offset": (0,)},
    free=("attention_scale",),
)
LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    "pretrain_gpt",
    {
        **_DECODER,
        "normalization": (Normalization.rmsnorm,),
        "position_embedding": (PositionEmbedding.rotary,),
        "activation": _GATED,
        "attention_scale": (True,),
    },
    free=("attention_bias", "mlp_bias", "rotary_base"),
    query_groups=True,
    free_head_size=True,
)
BERT = Family(
    "bert", "BertForPreTraining", "pretrain_bert", {**_ENCODER, "position_offset": (0,)}, free=("num_segments",)
)
BERT_WITHOUT_PAIRS = replace(BERT, architecture="BertForMaskedLM")
ROBERTA = Family(
    "roberta",
    "RobertaForMaskedLM",
    "pretrain_bert",
    {**_ENCODER, "activation": (Activation.gelu,)},
    free=("num_segments", "position_offset"),
)
T5 = Family(
    "t5",
    "T5ForConditionalGeneration",
    "pretrain_t5",
    {
        "architecture": (Architecture.encoder_decoder,),
        "normalization": (Normalization.rmsnorm,),
        "norm_placement": (NormPlacement.pre,),
        "embedding_norm": (False,),
        "position_embedding": (PositionEmbedding.relative,),
        "num_segments": (0,),
        "attention_bias": (False,),
        "attention_scale": (False,),
        "mlp_bias": (False,),
        **_PLAIN_HEAD,
    },
    free=("activation", "num_decoder_layers", "relative_buckets", "relative_max_distance", "scale_tied_head"),
    free_head_size=True,
)
BART = Family(
    "bart",
    "BartForConditionalGeneration",
    "pretrain_t5",
    {
        **_ADDITIVE,
        "architecture": (Architecture.encoder_decoder,),
        "norm_placement": (NormPlacement.post,),
        "norm_epsilon": (1e-5,),  # torch's default: its config.json has no key for it
        "embedding_norm": (True,),
        "position_offset": (2,),
        "num_segments": (0,),
        "attention_scale": (True,),
        "tie_embeddings": (True,),  # an untied one has three word tables, and we have one
        **_PLAIN_HEAD,
    },
    free=("num_decoder_layers",),
)


FAMILIES = (GPT2, LLAMA, BERT, BERT_WITHOUT_PAIRS, ROBERTA, T5, BART)


def counterpart(model: ModelConfig, *, next_sentence: bool = False) -> Family:
    """The family whose model of these sizes gives the same logits.

    Args:
        model: filled in; one whose head count does not divide hidden_size gets that as the reason.
        next_sentence: an encoder also classifies pairs (`derived.has_next_sentence_head`).
    Raises:
        NoCounterpart: lists every setting that the most likely family does not support.
    """
    family = _likely(model, next_sentence)
    reasons = list(_differences(model, family, next_sentence))
    if reasons:
        raise NoCounterpart(f"{family.architecture} of transformers has {', and '.join(reasons)}")
    return family


def _likely(model: ModelConfig, next_sentence: bool) -> Family:
    if model.architecture is Architecture.decoder:
        return LLAMA if model.position_embedding is PositionEmbedding.rotary else GPT2
    if model.architecture is Architecture.encoder:
        if model.position_offset:
            return ROBERTA
        return BERT if next_sentence else BERT_WITHOUT_PAIRS
    return T5 if model.position_embedding is PositionEmbedding.relative else BART


def _differences(model: ModelConfig, family: Family, next_sentence: bool) -> Iterator[str]:
    """Differences between the family and the model, in words."""
    for name, values in family.fixed.items():
        found = getattr(model, name)
        if found not in values:
            yield f"{' or '.join(map(as_word, values))} for model.{name}={as_word(found)}"
    for name, default in decisive_fields(type(model)):
        is_known = name in _OF_ALL or name in family.fixed or name in family.free or not is_read(name, model)
        if not is_known and getattr(model, name) != default:
            yield f"no model.{name}={as_word(getattr(model, name))}"
    heads, hidden = model.num_attention_heads, model.hidden_size
    if model.num_query_groups != heads and not family.query_groups:
        yield f"keys and values for each of {heads} heads, not model.num_query_groups={model.num_query_groups}"
    if not family.free_head_size and model.head_size != hidden / heads:
        size = f"model.hidden_size={hidden} / model.num_attention_heads={heads}"
        yield f"heads of {size} channels, not model.head_size={as_word(model.head_size)}"
    if family is LLAMA and hidden % heads:
        yield f"no model.num_attention_heads={heads} that does not divide model.hidden_size={hidden}"
    if family.script == "pretrain_bert" and not model.num_segments:
        yield "a segment table for model.num_segments=0"
    if family is ROBERTA and next_sentence:
        yield "no next-sentence head beside model.position_offset; BERT's is 0"


def is_read(name: str, model: ModelConfig) -> bool:
    """Whether a model with these settings reads the setting `name`."""
    if name == "scale_tied_head":
        return model.tie_embeddings
    return name not in _READ_WITH or _READ_WITH[name] in (model.architecture, model.position_embedding)
