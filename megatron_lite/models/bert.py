"""An encoder as a list of layers; BERT (arXiv 1810.04805) and RoBERTa (arXiv 1907.11692) differ only in settings.

    embedding (tokens [b, s]), position_embedding, segment_embedding (segments [b, s]), embedding_norm
    | layers.0 | ... | layers.N | next_sentence (sequence_logits [b, 2]), head_transform, head (logits [b, s, v/t]),
    head_bias

A pipeline stage may begin at each "|". It receives hidden [b, s, h], or [b, s/t, h] under sequence parallelism, and at
a block, where samples are padded, lengths [b].

Shapes: b micro-batch, s sequence, h hidden, v padded vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

from itertools import chain

from megatron_lite.models.fields import Field
from megatron_lite.models.layer_factory import LayerFactory
from megatron_lite.models.spec import LayerSpec


def bert_layers(factory: LayerFactory, *, next_sentence_head: bool) -> list[LayerSpec]:
    """Tokens [b, s] -> this rank's logits [b, s, v/t] and, with a next-sentence head, sequence_logits [b, 2]."""
    model = factory.model
    stage_inputs = (Field("hidden", factory.input("tokens").length), *factory.inputs_among("lengths"))
    embedding = factory.word_embedding(tied=model.tie_embeddings)
    classifier = factory.next_sentence() if next_sentence_head else []
    heads = [*factory.stack_end(), *classifier, *factory.head(embedding)]
    return [
        embedding,
        *factory.embedding_sum(),
        *chain(*factory.blocks(num_layers=model.num_layers, causal=False, stage_inputs=stage_inputs)),
        *factory.after_layers(heads, stage_inputs[0]),
    ]
