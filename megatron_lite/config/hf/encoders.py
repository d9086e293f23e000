"""Encoder families."""

from __future__ import annotations

from typing import Any

from megatron_lite.config.hf.family import REMOVED, Family, keys
from megatron_lite.config.hf.parts import POSITIONS_BEHIND_PADDING
from megatron_lite.config.hf.shared import ACTIVATIONS, ADDITIVE, EVERYWHERE, POST_NORM
from megatron_lite.config.hf.tensors import Place, inside, module, split_qkv, tied_or_untied
from megatron_lite.config.schema import Activation, Architecture

_ENCODER: dict[str, tuple[Any, ...]] = {
    **ADDITIVE,
    **POST_NORM,
    "architecture": (Architecture.encoder,),
    "head_transform": (True,),
    "head_bias": (True,),
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


def _stack(body: str) -> dict[str, Place]:
    """The embeddings and the layers."""
    return {
        "embedding": module(f"{body}.embeddings.word_embeddings"),
        "position_embedding": module(f"{body}.embeddings.position_embeddings"),
        "segment_embedding": module(f"{body}.embeddings.token_type_embeddings"),
        "embedding_norm": module(f"{body}.embeddings.LayerNorm"),
        **inside(
            "layers.*",
            f"{body}.encoder.layer.*",
            {
                "attention.qkv": split_qkv("attention.self.query", "attention.self.key", "attention.self.value"),
                "attention.projection": module("attention.output.dense"),
                "attention_norm": module("attention.output.LayerNorm"),
                "mlp.up": module("intermediate.dense"),
                "mlp.down": module("output.dense"),
                "mlp_norm": module("output.LayerNorm"),
            },
        ),
    }


BERT = Family(
    "bert",
    "BertForPreTraining",
    ("BertForPreTraining", "BertForMaskedLM", "BertModel", "BertForNextSentencePrediction"),
    fixed={**_ENCODER, "position_offset": (0,)},
    keys=keys(
        num_hidden_layers=("num_layers", 12),
        hidden_size=("hidden_size", 768),
        num_attention_heads=("num_attention_heads", 12),
        intermediate_size=("ffn_hidden_size", 3072),
        max_position_embeddings=("max_position_embeddings", 512),
        type_vocab_size=("num_segments", 2, 0),
        layer_norm_eps=("norm_epsilon", 1e-12),
        tie_word_embeddings=("tie_embeddings", True),
        hidden_dropout_prob=(("hidden_dropout", "embedding_dropout"), 0.1),
        attention_probs_dropout_prob=("attention_dropout", 0.1),
    ),
    activation_key="hidden_act",
    activations=ACTIVATIONS,
    default_activation="gelu",
    vocab_size=30522,
    tokens={"pad_token_id": ("pad",)},
    tensors={
        **_stack("bert"),
        "next_sentence.pooler": module("bert.pooler.dense"),
        "head_transform.dense": module("cls.predictions.transform.dense"),
        "head_transform.norm": module("cls.predictions.transform.LayerNorm"),
        "head": module("cls.predictions.decoder"),
        "head_bias": tied_or_untied("cls.predictions", "cls.predictions.decoder"),
        "next_sentence.classifier": module("cls.seq_relationship"),
    },
    demands={
        "position_embedding_type": ("absolute",),
        "is_encoder_decoder": (False,),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        **EVERYWHERE,
    },
    harmless=_CLASSIFIERS,
    nonzero={"num_segments": "a segment table"},
    next_sentence=True,
    ignored=(
        r"(bert\.)?embeddings\.(position_ids|token_type_ids)"
        # next-sentence head, where none is trained
        r"|(bert\.)?pooler\.dense\.(weight|bias)|cls\.seq_relationship\.(weight|bias)"
    ),
)
BERT_WITHOUT_PAIRS = Family.like(BERT, architecture="BertForMaskedLM", next_sentence=False)
ROBERTA = Family.like(
    BERT,
    model_type="roberta",
    architecture="RobertaForMaskedLM",
    architectures=("RobertaForMaskedLM", "RobertaModel"),
    fixed={"position_offset": REMOVED},
    activations=dict.fromkeys(ACTIVATIONS, REMOVED)
    | {"gelu": Activation.gelu},  # the transform of its head has no other
    vocab_size=50265,
    tokens={"bos_token_id": ("bos",), "eos_token_id": ("eos", "eod")},
    tensors={
        **dict.fromkeys(BERT.tensors, REMOVED),
        **_stack("roberta"),
        "head_transform.dense": module("lm_head.dense"),
        "head_transform.norm": module("lm_head.layer_norm"),
        "head": module("lm_head.decoder"),
        "head_bias": tied_or_untied("lm_head", "lm_head.decoder"),
    },
    parts=(POSITIONS_BEHIND_PADDING,),
    nonzero={"position_offset": "a padding token before the first position"},
    next_sentence=False,
    ignored=r"(roberta\.)?embeddings\.(position_ids|token_type_ids)|(roberta\.)?pooler\.dense\.(weight|bias)",
)
ENCODERS = (
    BERT,
    BERT_WITHOUT_PAIRS,
    ROBERTA,
)
