"""One transformer layer: norm, attention, residual; norm, MLP, residual.

Shapes: b micro-batch, s sequence, h hidden, t tensor-parallel size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_lite.config.schema import ModelConfig, Recompute
from megatron_lite.models.attention import Attention
from megatron_lite.models.dropout import activation_dropout
from megatron_lite.models.mlp import build_mlp
from megatron_lite.models.norms import build_norm
from megatron_lite.models.positions import RotaryTable
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.rng import DropoutKey


class TransformerBlock(nn.Module):
    """[b, s, h] -> [b, s, h] ([b, s/t, h] under sequence parallelism), normalised ahead of each part."""

    def __init__(
        self,
        model: ModelConfig,
        context: ParallelContext,
        name: str,
        *,
        rotary: RotaryTable | None,
        recompute: Recompute,
    ) -> None:
        super().__init__()
        self.context = context
        self.name = name
        self.hidden_dropout = model.hidden_dropout
        self.has_dropout = model.hidden_dropout > 0.0 or model.attention_dropout > 0.0
        self.recompute = recompute is Recompute.full
        self.input_norm = build_norm(model, context)
        self.attention = Attention(model, context, rotary=rotary, recompute=recompute is Recompute.selective)
        self.post_attention_norm = build_norm(model, context)
        self.mlp = build_mlp(model, context)

    def forward(self, x: Tensor) -> Tensor:
        # Taken here, outside of what may run a second time, so that the second run draws the same masks.
        key = self.context.rng.next_key(self.name) if self.training and self.has_dropout else None
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, key, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x, key)

    def _forward(self, x: Tensor, key: DropoutKey | None) -> Tensor:
        x = x + self._dropout(self.attention(self.input_norm(x), key), key, "attention_output")
        return x + self._dropout(self.mlp(self.post_attention_norm(x)), key, "mlp_output")

    def _dropout(self, x: Tensor, key: DropoutKey | None, site: str) -> Tensor:
        return activation_dropout(x, self.hidden_dropout, key, site, self.context)
