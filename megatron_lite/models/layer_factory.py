"""Builds the entries of a model's layer list, and defines what each does to the activations.

Shapes: b micro-batch, s sequence, h hidden, v padded vocabulary, t tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.config.schema import NormPlacement, PositionEmbedding, Recompute
from megatron_lite.models.activations import Activations
from megatron_lite.models.block import TransformerBlock
from megatron_lite.models.compiled import run_compiled
from megatron_lite.models.dropout import HiddenDropout
from megatron_lite.models.fields import Field
from megatron_lite.models.heads import HeadBias, HeadTransform, NextSentenceHead
from megatron_lite.models.initial import StackInit, stack_init
from megatron_lite.models.masks import Visibility
from megatron_lite.models.norms import build_norm
from megatron_lite.models.positions import PositionTable, RotaryTable, SegmentTable
from megatron_lite.models.relative import RelativeBias
from megatron_lite.models.spec import LayerSpec, layer_spec
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.layers import VocabParallelEmbedding
from megatron_lite.parallel.sharding import Init
from megatron_lite.parallel.topology import padded_vocab_size


class LayerFactory:
    """Makes the entries of one model's layer list.

    `prefix` of a method is the prefix of global names: "" in a model with one stack, else "encoder." or "decoder.".
    """

    def __init__(
        self,
        model: ResolvedModel,
        context: ParallelContext,
        *,
        vocab_size: int,
        recompute: Recompute,
        inputs: tuple[Field, ...],
        compiled_blocks: bool,
    ) -> None:
        """
        Args:
            vocab_size: the tokenizer's true size; the table is padded from it.
            inputs: the fields of a batch.
        """
        self.model = model
        self.context = context
        self.inputs = inputs
        self._vocab_size = vocab_size
        self._padded = padded_vocab_size(vocab_size, model.vocab_pad_multiple, context.tensor_size)
        self._recompute = recompute
        self._apply_block = partial(apply_block, compiled=compiled_blocks)
        self._embedding_init = stack_init(model, model.num_layers)  # tables and heads do not depend on the stack
        self._rotary = None
        if model.position_embedding is PositionEmbedding.rotary:
            self._rotary = RotaryTable(model.head_size, model.rotary_base)

    def input(self, name: str) -> Field:
        """The input field with this name."""
        return next(field for field in self.inputs if field.name == name)

    def inputs_among(self, *names: str) -> tuple[Field, ...]:
        """The input fields whose name is one of `names`."""
        return tuple(field for field in self.inputs if field.name in names)

    def word_embedding(self, *, tied: bool) -> LayerSpec:
        """The first entry: tokens -> hidden. `tied`: other entries share its table."""

        def make() -> nn.Module:
            return self._table(self._embedding_init.embedding)

        key = "embedding" if tied else None
        return layer_spec("embedding", make, embed_tokens, self.context, tied=key, stage_inputs=self.inputs)

    def embedding_sum(self, prefix: str = "") -> list[LayerSpec]:
        """The layers between the word embedding and the first block."""
        model, init = self.model, self._embedding_init
        entries = []
        if model.position_embedding is PositionEmbedding.learned:
            entries.append(
                self._spec(f"{prefix}position_embedding", lambda: PositionTable(model, self.context, init), on_hidden)
            )
        if model.num_segments:
            entries.append(
                self._spec(f"{prefix}segment_embedding", lambda: SegmentTable(model, self.context, init), add_segments)
            )
        if model.embedding_norm:
            entries.append(self._spec(f"{prefix}embedding_norm", lambda: build_norm(model, self.context), on_hidden))
        return entries + self._dropout(f"{prefix}embedding_dropout", model.embedding_dropout, "embedding")

    def blocks(
        self,
        prefix: str = "",
        *,
        num_layers: int,
        causal: bool,
        stage_inputs: tuple[Field, ...],
        cross_attention: bool = False,
    ) -> list[list[LayerSpec]]:
        """One list for each transformer layer; a pipeline stage may begin at any of them.

        Args:
            stage_inputs: what a stage that begins at one of these layers receives.
        """
        init = stack_init(self.model, num_layers, cross_attention=cross_attention)

        def block(name: str) -> nn.Module:
            return TransformerBlock(
                self.model,
                self.context,
                name,
                init,
                causal=causal,
                cross_attention=cross_attention,
                rotary=self._rotary,
                recompute=self._recompute,
            )

        names = [f"{prefix}layers.{index}" for index in range(num_layers)]
        layers = [[self._spec(name, partial(block, name), self._apply_block)] for name in names]
        if self.model.position_embedding is PositionEmbedding.relative:
            bias = self._relative_bias(f"{prefix}relative_bias", init, causal=causal)
            layers = [[bias, *layer] for layer in layers]
        return [[replace(layer[0], stage_inputs=stage_inputs), *layer[1:]] for layer in layers]

    def stack_end(self, prefix: str = "") -> list[LayerSpec]:
        """Layers after the last block: the final norm of a pre-norm stack (a post-norm block ends with its norm)."""
        entries = []
        if self.model.norm_placement is NormPlacement.pre:
            entries.append(self._spec(f"{prefix}final_norm", lambda: build_norm(self.model, self.context), on_hidden))
        return entries + self._dropout(f"{prefix}final_dropout", self.model.final_dropout, "final")

    @staticmethod
    def after_layers(entries: list[LayerSpec], hidden: Field) -> list[LayerSpec]:
        """The entries after the last transformer layer, which may be a pipeline stage of their own."""
        return [replace(entries[0], stage_inputs=(hidden,)), *entries[1:]]

    def next_sentence(self) -> list[LayerSpec]:
        """hidden -> sequence_logits."""

        def make() -> nn.Module:
            return NextSentenceHead(self.model, self.context, self._embedding_init)

        return [self._spec("next_sentence", make, apply_next_sentence)]

    def head(self, embedding: LayerSpec) -> list[LayerSpec]:
        """hidden -> hidden and the head for it. `embedding`: the entry whose table a tied head uses."""
        model, init = self.model, self._embedding_init
        entries = []
        if model.head_transform:
            entries.append(self._spec("head_transform", lambda: HeadTransform(model, self.context, init), on_hidden))
        if model.tie_embeddings:
            scale = model.hidden_size**-0.5 if model.scale_tied_head else None
            entries.append(replace(embedding, name="head", apply=partial(leave_head, scale=scale), stage_inputs=None))
        else:
            entries.append(self._spec("head", self._untied_head, partial(leave_head, scale=None)))
        if model.head_bias:

            def bias() -> nn.Module:
                return HeadBias(self._vocab_size, self.context, padded_vocab_size=self._padded)

            entries.append(self._spec("head_bias", bias, leave_head_bias))
        return entries

    def _untied_head(self) -> nn.Module:
        return self._table(self._embedding_init.head)

    def _table(self, init: Init) -> nn.Module:
        """[v, h], split by rows."""
        return VocabParallelEmbedding(
            self._vocab_size, self.model.hidden_size, self.context, padded_vocab_size=self._padded, init=init
        )

    def _relative_bias(self, name: str, init: StackInit, *, causal: bool) -> LayerSpec:
        """One table shared by the stack. An entry precedes every block, so that a stage may begin at any block."""
        apply = partial(add_relative_bias, split=self.context.tensor_size if self.context.sequence_parallel else 1)

        def make() -> nn.Module:
            return RelativeBias(self.model, self.context, init, causal=causal)

        return layer_spec(name, make, apply, self.context, tied=name.replace(".", "_"))  # a key that DeepSpeed accepts

    def _dropout(self, name: str, probability: float, site: str) -> list[LayerSpec]:
        if probability == 0.0:
            return []
        return [self._spec(name, lambda: HiddenDropout(probability, self.context, name, site), on_hidden)]

    def _spec(
        self, name: str, make: Callable[[], nn.Module], apply: Callable[[Any, Activations], Activations]
    ) -> LayerSpec:
        return layer_spec(name, make, apply, self.context)


def embed_tokens(embedding: nn.Module, x: Activations) -> Activations:
    return replace(x, hidden=embedding(x.tokens))


def on_hidden(module: nn.Module, x: Activations) -> Activations:
    return replace(x, hidden=module(x.hidden))


def add_segments(table: nn.Module, x: Activations) -> Activations:
    return replace(x, hidden=table(x.hidden, x.segments))


def add_relative_bias(bias: nn.Module, x: Activations, *, split: int) -> Activations:
    """Compute the bias at the first of a stack's entries on this pipeline stage; the later ones reuse it.

    Args:
        split: number of slices of the sequence.
    """
    if x.position_bias is not None:
        return x
    assert x.hidden is not None
    return replace(x, position_bias=bias(x.hidden.shape[1] * split, x.lengths))


def apply_block(block: TransformerBlock, x: Activations, *, compiled: bool) -> Activations:
    assert x.hidden is not None
    run = partial(run_compiled, block) if compiled else block
    visibility = Visibility(x.lengths, x.prefix_lengths, x.position_bias)
    arguments = x.hidden, visibility, x.memory, block.next_key(), block.angles(x.hidden)
    if block.recompute and torch.is_grad_enabled():
        # No random state to preserve: dropout masks depend only on the key, which is drawn above.
        return replace(x, hidden=checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False))
    return replace(x, hidden=run(*arguments))


def apply_next_sentence(head: nn.Module, x: Activations) -> Activations:
    return replace(x, sequence_logits=head(x.hidden))


def leave_head(head: nn.Module, x: Activations, *, scale: float | None) -> Activations:
    """Leave the head for the model's end, which may want no logits.

    Args:
        scale: of the hidden states (T5 with tied embeddings).
    """
    return replace(x, head=lambda hidden, use: head(hidden if scale is None else hidden * scale, use))


def leave_head_bias(bias: nn.Module, x: Activations) -> Activations:
    head = x.head
    return replace(x, head=lambda hidden, use: bias(hidden, head, use))
