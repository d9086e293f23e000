"""Names and full shapes of all parameters of a model, known before anything is built. Imports no torch.

`models.build.build_layers` creates the parameters; a test compares the two for every family.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.config.schema import Architecture, Normalization, NormPlacement, PositionEmbedding
from megatron_lite.models.stored import Shape

Named = Iterator[tuple[str, Shape]]


def parameter_shapes(model: ResolvedModel, vocab_size: int, *, next_sentence: bool = False) -> dict[str, Shape]:
    """Global name -> full shape of every parameter.

    Args:
        vocab_size: true vocabulary, without padded rows.
        next_sentence: an encoder also classifies pairs (`derived.has_next_sentence_head`).
    """
    return dict(_parameters(model, vocab_size, next_sentence))


def _parameters(model: ResolvedModel, vocab_size: int, next_sentence: bool) -> Named:
    hidden = model.hidden_size
    yield "embedding.weight", (vocab_size, hidden)
    if model.architecture is Architecture.encoder_decoder:
        yield from _stack(model, "encoder.", model.num_layers, decoder=False)
        yield from _stack(model, "decoder.", model.decoder_layers, decoder=True)
    else:
        yield from _stack(model, "", model.num_layers, decoder=False)
    if next_sentence:
        yield from _dense("next_sentence.pooler", hidden, hidden, bias=True)
        yield from _dense("next_sentence.classifier", hidden, 2, bias=True)
    if model.head_transform:
        yield from _dense("head_transform.dense", hidden, hidden, bias=True)
        yield from _norm(model, "head_transform.norm")
    if not model.tie_embeddings:
        yield "head.weight", (vocab_size, hidden)
    if model.head_bias:
        yield "head_bias.bias", (vocab_size,)


def _stack(model: ResolvedModel, prefix: str, num_layers: int, *, decoder: bool) -> Named:
    """Parameters of one stack; `decoder`: the decoder of an encoder_decoder."""
    hidden = model.hidden_size
    if model.position_embedding is PositionEmbedding.learned:
        rows = model.max_position_embeddings + model.position_offset
        yield f"{prefix}position_embedding.weight", (rows, hidden)
    if model.num_segments:
        yield f"{prefix}segment_embedding.weight", (model.num_segments, hidden)
    if model.embedding_norm:
        yield from _norm(model, f"{prefix}embedding_norm")
    if model.position_embedding is PositionEmbedding.relative:
        yield f"{prefix}relative_bias.weight", (model.relative_buckets, model.num_attention_heads)
    for index in range(num_layers):
        yield from _layer(model, f"{prefix}layers.{index}", decoder=decoder)
    if model.norm_placement is NormPlacement.pre:
        yield from _norm(model, f"{prefix}final_norm")


def _layer(model: ResolvedModel, name: str, *, decoder: bool) -> Named:
    hidden, inner = model.hidden_size, model.num_attention_heads * model.head_size
    groups, bias = model.num_query_groups * model.head_size, model.attention_bias
    yield from _norm(model, f"{name}.attention_norm")
    yield from _dense(f"{name}.attention.qkv", hidden, inner + 2 * groups, bias=bias)
    yield from _dense(f"{name}.attention.projection", inner, hidden, bias=bias)
    if decoder:
        yield from _norm(model, f"{name}.cross_attention_norm")
        yield from _dense(f"{name}.cross_attention.query", hidden, inner, bias=bias)
        yield from _dense(f"{name}.cross_attention.key_value", hidden, groups, bias=bias, stacked=(2,))
        yield from _dense(f"{name}.cross_attention.projection", inner, hidden, bias=bias)
    yield from _norm(model, f"{name}.mlp_norm")
    up, stacked = ("gate_up", (2,)) if model.activation.is_gated else ("up", ())
    yield from _dense(f"{name}.mlp.{up}", hidden, model.ffn_hidden_size, bias=model.mlp_bias, stacked=stacked)
    yield from _dense(f"{name}.mlp.down", model.ffn_hidden_size, hidden, bias=model.mlp_bias)


def _norm(model: ResolvedModel, name: str) -> Named:
    yield f"{name}.weight", (model.hidden_size,)
    if model.normalization is Normalization.layernorm:
        yield f"{name}.bias", (model.hidden_size,)


def _dense(name: str, inputs: int, outputs: int, *, bias: bool, stacked: Shape = ()) -> Named:
    yield f"{name}.weight", (*stacked, outputs, inputs)
    if bias:
        yield f"{name}.bias", (*stacked, outputs)
