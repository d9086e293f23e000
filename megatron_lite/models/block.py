"""One transformer layer: attention, in a decoder with an encoder cross-attention, and MLP, each added to its input.

Shapes: b micro-batch, s sequence, e positions of the encoder, h hidden, t tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_lite.config.schema import ModelConfig, NormPlacement, Recompute
from megatron_lite.models.attention import Attention
from megatron_lite.models.cross_attention import CrossAttention
from megatron_lite.models.dropout import activation_dropout
from megatron_lite.models.initial import StackInit
from megatron_lite.models.masks import Visibility
from megatron_lite.models.mlp import build_mlp
from megatron_lite.models.norms import build_norm
from megatron_lite.models.positions import RotaryTable
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.rng import DropoutKey


class TransformerBlock(nn.Module):
    """[b, s, h] -> [b, s, h] ([b, s/t, h] under sequence parallelism).

    Each part has its norm: pre-norm x + part(norm(x)), or post-norm norm(x + part(x)) (arXiv 2002.04745).
    """

    def __init__(
        self,
        model: ModelConfig,
        context: ParallelContext,
        name: str,
        init: StackInit,
        *,
        causal: bool,
        cross_attention: bool,
        rotary: RotaryTable | None,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        self.context = context
        self.name = name
        self.norm_first = model.norm_placement is NormPlacement.pre
        self.hidden_dropout = model.hidden_dropout
        self.has_dropout = max(model.hidden_dropout, model.attention_dropout, model.ffn_dropout) > 0.0
        self.recompute = recompute is Recompute.full
        selective = recompute is Recompute.selective
        self.attention_norm = build_norm(model, context)
        self.attention = Attention(model, context, init, causal=causal, rotary=rotary, recompute=selective)
        self.cross_attention = None
        if cross_attention:
            self.cross_attention_norm = build_norm(model, context)
            self.cross_attention = CrossAttention(model, context, init, recompute=selective)
        self.mlp_norm = build_norm(model, context)
        self.mlp = build_mlp(model, context, init)

    def forward(self, x: Tensor, visibility: Visibility, memory: Tensor | None = None) -> Tensor:
        """
        Args:
            visibility: its `lengths` are those of memory where there is cross-attention.
            memory: [b, e, h], or [b, e/t, h]; for cross-attention.
        """
        # Taken here, outside of what may run a second time, so that the second run draws the same masks.
        key = self.context.rng.next_key(self.name) if self.training and self.has_dropout else None
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, visibility, memory, key, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x, visibility, memory, key)

    def _forward(self, x: Tensor, visibility: Visibility, memory: Tensor | None, key: DropoutKey | None) -> Tensor:
        def add(x: Tensor, part: Callable[[Tensor], Tensor], norm: nn.Module, site: str) -> Tensor:
            part_of_x = part(norm(x) if self.norm_first else x)
            x = x + activation_dropout(part_of_x, self.hidden_dropout, key, site, self.context)
            return x if self.norm_first else norm(x)

        x = add(x, lambda y: self.attention(y, key, visibility), self.attention_norm, "attention_output")
        if self.cross_attention is not None:
            cross, lengths = self.cross_attention, visibility.lengths
            x = add(x, lambda y: cross(y, memory, lengths, key), self.cross_attention_norm, "cross_attention_output")
        return add(x, lambda y: self.mlp(y, key), self.mlp_norm, "mlp_output")
