"""A decoder-only transformer as a list of layers; GPT-2, LLaMA and prefix language models differ only in settings.

    embedding (tokens [b, s]) | layers.0 | ... | layers.N | final_norm, head (logits [b, s, v/t])

A pipeline stage may begin at each "|". It receives hidden [b, s, h], or [b, s/t, h] under sequence parallelism, and at
a block of a prefix language model prefix_lengths [b]: positions before it attend to each other in both directions.

Shapes: b micro-batch, s sequence, h hidden, v padded vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

from itertools import chain

from megatron_lite.models.fields import Field
from megatron_lite.models.layer_factory import LayerFactory
from megatron_lite.models.spec import LayerSpec


def gpt_layers(factory: LayerFactory) -> list[LayerSpec]:
    """Tokens [b, s] -> this rank's logits [b, s, v/t]."""
    model = factory.model
    stage_inputs = (Field("hidden", factory.input("tokens").length), *factory.inputs_among("prefix_lengths"))
    embedding = factory.word_embedding(tied=model.tie_embeddings)
    return [
        embedding,
        *factory.embedding_sum(),
        *chain(*factory.blocks(num_layers=model.num_layers, causal=True, stage_inputs=stage_inputs)),
        *factory.after_layers([*factory.stack_end(), *factory.head(embedding)], stage_inputs[0]),
    ]
