"""One transformer layer: attention, cross-attention in a decoder with an encoder, and MLP, each with a residual sum.

Shapes: b micro-batch, s sequence, e positions of the encoder, h hidden, t tensor-parallel size.
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron_lite.config.resolved import ResolvedModel
from megatron_lite.config.schema import NormPlacement, Recompute
from megatron_lite.models.attention import Attention
from megatron_lite.models.cross_attention import CrossAttention
from megatron_lite.models.dropout import activation_dropout
from megatron_lite.models.initial import StackInit
from megatron_lite.models.masks import Visibility
from megatron_lite.models.mlp import MLP
from megatron_lite.models.norms import build_norm
from megatron_lite.models.positions import Angles, RotaryTable
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.rng import DropoutKey, Key


class TransformerBlock(nn.Module):
    """[b, s, h] -> [b, s, h] ([b, s/t, h] under sequence parallelism).

    Each part has its norm: pre-norm x + part(norm(x)), or post-norm norm(x + part(x)) (arXiv 2002.04745).
    """

    def __init__(
        self,
        model: ResolvedModel,
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
        self.rotary = rotary
        self.recompute = recompute is Recompute.full
        """Recompute the whole forward pass in the backward pass; `layer_factory.apply_block` does it."""
        selective = recompute is Recompute.selective
        self.attention_norm = build_norm(model, context)
        self.attention = Attention(model, context, init, causal=causal, recompute=selective)
        self.cross_attention = None
        if cross_attention:
            self.cross_attention_norm = build_norm(model, context)
            self.cross_attention = CrossAttention(model, context, init, recompute=selective)
        self.mlp_norm = build_norm(model, context)
        self.mlp = MLP(model, context, init)

    def next_key(self) -> DropoutKey | None:
        """Key of one micro-batch's dropout masks; None without dropout.

        Taken before the forward pass and outside of what is recomputed, so that recomputation draws the same masks.
        """
        return self.context.rng.next_key(self.name) if self.training and self.has_dropout else None

    def angles(self, x: Tensor) -> Angles | None:
        """Of the rotary embedding for the positions of x, which may be a slice of the sequence. Like the key, it comes
        from outside of `forward`: a compiled block can change no table."""
        slices = self.context.tensor_size if self.context.sequence_parallel else 1
        return None if self.rotary is None else self.rotary(slices * x.shape[1], x.device)

    def forward(
        self, x: Tensor, visibility: Visibility, memory: Tensor | None, key: Key | None, angles: Angles | None
    ) -> Tensor:
        """
        Args:
            visibility: with cross-attention, its `lengths` are those of memory.
            memory: the encoder's output [b, e, h], or [b, e/t, h]; for cross-attention.
            key: the result of `next_key`.
            angles: the result of `angles`.
        """
        first = self.norm_first
        part = self.attention(self.attention_norm(x) if first else x, key, visibility, angles)
        x = x + activation_dropout(part, self.hidden_dropout, key, "attention_output", self.context)
        x = x if first else self.attention_norm(x)
        if self.cross_attention is not None:
            part = self.cross_attention(self.cross_attention_norm(x) if first else x, memory, visibility.lengths, key)
            x = x + activation_dropout(part, self.hidden_dropout, key, "cross_attention_output", self.context)
            x = x if first else self.cross_attention_norm(x)
        part = self.mlp(self.mlp_norm(x) if first else x, key)
        x = x + activation_dropout(part, self.hidden_dropout, key, "mlp_output", self.context)
        return x if first else self.mlp_norm(x)
