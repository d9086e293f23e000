"""From a model's settings to its layer list: the only entry point."""

from __future__ import annotations

from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.config.schema import Architecture, Recompute
from megatron_lite.models.bert import bert_layers
from megatron_lite.models.encoder_decoder import encoder_decoder_layers
from megatron_lite.models.fields import Field
from megatron_lite.models.gpt import gpt_layers
from megatron_lite.models.layer_factory import LayerFactory
from megatron_lite.models.spec import LayerSpec
from megatron_lite.parallel.context import ParallelContext


def build_layers(
    model: ResolvedModel,
    context: ParallelContext,
    *,
    vocab_size: int,
    recompute: Recompute,
    inputs: tuple[Field, ...],
    next_sentence_head: bool = False,
    compiled_blocks: bool = False,
) -> list[LayerSpec]:
    """The layer list that maps the inputs of a batch to this rank's vocabulary-parallel logits.

    Args:
        vocab_size: the tokenizer's true size; the table is padded from it.
        inputs: what the objective provides; `lengths` and `prefix_lengths` among them decide the attention masks.
        next_sentence_head: an encoder also classifies the whole sample: `sequence_logits` [b, 2].
        compiled_blocks: torch.compile makes one graph of each kind of block, for training.
    """
    factory = LayerFactory(
        model,
        context,
        vocab_size=vocab_size,
        recompute=recompute,
        inputs=inputs,
        compiled_blocks=compiled_blocks,
    )
    if model.architecture is Architecture.decoder:
        return gpt_layers(factory)
    if model.architecture is Architecture.encoder:
        return bert_layers(factory, next_sentence_head=next_sentence_head)
    return encoder_decoder_layers(factory)
