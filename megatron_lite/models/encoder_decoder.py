"""An encoder and a decoder as one list of layers, for T5 (arXiv 1910.10683) and BART (arXiv 1910.13461).

    T5:   embedding (tokens [b, e]) | encoder.relative_bias, encoder.layers.0 | ...
          | encoder.final_norm, decoder.embedding (decoder_tokens [b, d]), decoder.relative_bias, decoder.layers.0
          | decoder.relative_bias, decoder.layers.1 | ... | decoder.final_norm, head (logits [b, d, v/t])
    BART: embedding, encoder.position_embedding, encoder.embedding_norm | encoder.layers.0 | ...
          | decoder.embedding, decoder.position_embedding, decoder.embedding_norm, decoder.layers.0
          | decoder.layers.1 | ... | head

A pipeline stage may begin at each "|". It receives:
    at a layer of the encoder, or where the decoder begins:  hidden [b, e, h], decoder_tokens [b, d], lengths [b]
    at a later layer of the decoder:  hidden [b, d, h], memory [b, e, h], lengths [b]
    after the last layer:  hidden [b, d, h]
Hidden states have e/t and d/t positions under sequence parallelism; lengths are sent only where samples are padded. So
`StageBoundary` sends one float tensor, of e or e + d positions, and at most one int64 tensor. The relative bias is not
sent: each stage computes it from its copy of the table.

One word table serves the encoder's input, the decoder's input and, where tied, the head.

Shapes: b micro-batch, e positions of the encoder, d of the decoder, h hidden, v padded vocabulary, t tensor-parallel
size.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from torch import nn

from megatron_lite.models.activations import Activations
from megatron_lite.models.fields import Field
from megatron_lite.models.layer_factory import LayerFactory
from megatron_lite.models.spec import LayerSpec


def encoder_decoder_layers(factory: LayerFactory) -> list[LayerSpec]:
    """Tokens [b, e] and decoder_tokens [b, d] -> this rank's logits [b, d, v/t]."""
    model = factory.model
    decoder_tokens, lengths = factory.input("decoder_tokens"), factory.inputs_among("lengths")
    memory = Field("memory", factory.input("tokens").length)
    into_encoder = (memory._replace(name="hidden"), decoder_tokens, *lengths)
    into_decoder = (Field("hidden", decoder_tokens.length), memory, *lengths)

    embedding = factory.word_embedding(tied=True)
    encoder = factory.blocks("encoder.", num_layers=model.num_layers, causal=False, stage_inputs=into_encoder)
    first, *others = factory.blocks(
        "decoder.", num_layers=model.decoder_layers, causal=True, stage_inputs=into_decoder, cross_attention=True
    )
    between = [
        *factory.stack_end("encoder."),
        replace(embedding, name="decoder.embedding", apply=_begin_decoder, stage_inputs=None),
        *factory.embedding_sum("decoder."),
        replace(first[0], stage_inputs=None),
        *first[1:],
    ]
    # No stage begins between here and the second decoder layer.
    between[0] = replace(between[0], stage_inputs=into_encoder)
    return [
        embedding,
        *factory.embedding_sum("encoder."),
        *chain(*encoder),
        *between,
        *chain(*others),
        *factory.after_layers([*factory.stack_end("decoder."), *factory.head(embedding)], into_decoder[0]),
    ]


def _begin_decoder(embedding: nn.Module, x: Activations) -> Activations:
    return replace(x, memory=x.hidden, hidden=embedding(x.decoder_tokens), position_bias=None)
