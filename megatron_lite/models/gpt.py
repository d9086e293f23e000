"""A decoder-only transformer as a list of layers; GPT-2 and LLaMA are two settings of it.

Shapes: b micro-batch, s sequence, h hidden, v padded vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from megatron_lite.config.derived import complete_model
from megatron_lite.config.schema import ModelConfig, PositionEmbedding, Recompute
from megatron_lite.models.block import TransformerBlock
from megatron_lite.models.norms import build_norm
from megatron_lite.models.positions import PositionLayer, RotaryTable
from megatron_lite.models.spec import LayerSpec
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
from megatron_lite.parallel.sharding import initialise, set_global_names
from megatron_lite.parallel.topology import padded_vocab_size


def gpt_layers(
    model: ModelConfig, context: ParallelContext, *, vocab_size: int, recompute: Recompute
) -> list[LayerSpec]:
    """Token ids [b, s] int64 -> this rank's logits [b, s, v/t], layer by layer.

    Args:
        vocab_size: the tokenizer's true size; the table is padded from it.
    """
    model = complete_model(model)
    rotary = None
    if model.position_embedding is PositionEmbedding.rotary:
        assert model.head_size is not None  # by complete_model
        rotary = RotaryTable(model.head_size, model.rotary_base)
    padded = padded_vocab_size(vocab_size, model.vocab_pad_multiple, context.tensor_size)

    def spec(name: str, make: Callable[[], nn.Module]) -> LayerSpec:
        return LayerSpec(name, partial(_build, make, name, context))

    def block(name: str) -> LayerSpec:
        return spec(name, lambda: TransformerBlock(model, context, name, rotary=rotary, recompute=recompute))

    embedding = spec(
        "embedding",
        lambda: VocabParallelEmbedding(
            vocab_size, model.hidden_size, context, padded_vocab_size=padded, init_std=model.init_std
        ),
    )
    layers = [embedding]
    if model.position_embedding is PositionEmbedding.learned or model.embedding_dropout > 0.0:
        layers.append(spec("position_embedding", lambda: PositionLayer(model, context, "position_embedding")))
    layers += [block(f"layers.{index}") for index in range(model.num_layers)]
    layers.append(spec("final_norm", lambda: build_norm(model, context)))
    if model.tie_embeddings:
        layers[0] = replace(embedding, tied="embedding")
        return [*layers, replace(embedding, name="head", tied="embedding", forward=_apply_as_head)]
    head = spec(
        "head",
        lambda: ColumnParallelLinear(
            model.hidden_size,
            vocab_size,
            context,
            bias=False,
            init_std=model.init_std,
            padded_out_features=padded,
        ),
    )
    return [*layers, head]


def _build(make: Callable[[], nn.Module], name: str, context: ParallelContext) -> nn.Module:
    module = make()
    set_global_names(module, name)
    initialise(module, name, context.seed, context)
    return module


def _apply_as_head(embedding: nn.Module, x: Tensor) -> Tensor:
    return embedding(x, as_head=True)
