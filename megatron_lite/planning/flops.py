"""FLOPs that a model needs for one token, term by term, and the dense peaks that they are measured against.

Only matrix products count, a multiply-add as two. A training step costs three forward passes: one forward and two in
the backward pass (for the inputs and for the weights). Recomputed activations are not counted: they are work that the
layout costs, not work that the model needs (MFU, not HFU; PaLM, arXiv 2204.02311, appendix B).

Attention scores count as what a causal model needs: position i looks at i + 1 positions, (s + 1) / 2 on average. PaLM
and nanoGPT count the full square, s for every position; `causal=False` gives their figure.

Legend: h hidden size, n heads, g query groups, d head size, f inner width of the MLP, v vocabulary, s sequence,
L layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_lite.config.derived import complete_model
from megatron_lite.config.schema import Activation, ModelConfig, Precision

PASSES = 3  # forward, gradient of the inputs, gradient of the weights


@dataclass(frozen=True)
class FlopsPerToken:
    """Forward FLOPs of one token through all layers, by term."""

    query_key_value: float
    """2 L h (n + 2g) d."""
    attention_scores: float
    """Scores and weighted sum: 2 L n d (s + 1), or 4 L n d s for the full square."""
    projection: float
    """2 L n d h."""
    mlp: float
    """4 L h f, or 6 L h f for SwiGLU."""
    head: float
    """2 h v."""

    @property
    def forward(self) -> float:
        return self.query_key_value + self.attention_scores + self.projection + self.mlp + self.head

    @property
    def training(self) -> float:
        return PASSES * self.forward


def itemised_flops(model: ModelConfig, seq_length: int, vocab_size: int, *, causal: bool = True) -> FlopsPerToken:
    """Forward FLOPs per token.

    Args:
        vocab_size: true vocabulary; padded columns of the head are not work that the model needs.
        causal: count only the scores below the diagonal.
    """
    model = complete_model(model)
    assert model.num_query_groups is not None
    assert model.head_size is not None
    assert model.ffn_hidden_size is not None
    layers, hidden = model.num_layers, model.hidden_size
    heads = model.num_attention_heads * model.head_size
    keys_and_values = 2 * model.num_query_groups * model.head_size
    positions = (seq_length + 1) / 2 if causal else seq_length
    matrices = 3 if model.activation is Activation.swiglu else 2
    return FlopsPerToken(
        query_key_value=2 * layers * hidden * (heads + keys_and_values),
        attention_scores=2 * 2 * layers * heads * positions,
        projection=2 * layers * heads * hidden,
        mlp=2 * layers * matrices * hidden * model.ffn_hidden_size,
        head=2 * hidden * vocab_size,
    )


def flops_per_token(model: ModelConfig, seq_length: int, vocab_size: int) -> float:
    """FLOPs of one token's forward and backward pass: the numerator of MFU."""
    return itemised_flops(model, seq_length, vocab_size).training


@dataclass(frozen=True)
class DensePeak:
    """Dense FLOP/s of one device. Data sheets print twice as much for the tensor cores, for 2:4 sparse matrices."""

    half: float
    """bf16 and fp16 with fp32 sums; fp16 only where there is no bf16."""
    tf32: float | None
    fp32: float
    """Outside the tensor cores: what torch uses for float32 unless TF32 is allowed."""


# Sources: NVIDIA's data sheets of each product (V100 2020, A100 2021, A10 2021, L4 2023, H100 2023, H200 2023, HGX B200
# 2024) and "NVIDIA Ada GPU Architecture", appendix A, for the RTX 4090; sparse figures halved. The first match counts.
DENSE_PEAKS: tuple[tuple[str, DensePeak], ...] = (
    (r"\bB200\b", DensePeak(half=2250e12, tf32=1125e12, fp32=75e12)),
    (r"\bH200\b", DensePeak(half=989.4e12, tf32=494.7e12, fp32=66.9e12)),
    (r"\bH100 PCIe\b", DensePeak(half=756e12, tf32=378e12, fp32=51e12)),
    (r"\bH100 NVL\b", DensePeak(half=835e12, tf32=417.5e12, fp32=60e12)),
    (r"\bH100\b", DensePeak(half=989.4e12, tf32=494.7e12, fp32=66.9e12)),
    (r"\bA100\b", DensePeak(half=312e12, tf32=156e12, fp32=19.5e12)),
    (r"\bA10\b", DensePeak(half=125e12, tf32=62.5e12, fp32=31.2e12)),
    (r"\bL4\b", DensePeak(half=121e12, tf32=60e12, fp32=30.3e12)),
    (r"\bRTX 4090\b", DensePeak(half=165.2e12, tf32=82.6e12, fp32=82.6e12)),
    (r"\bV100\b", DensePeak(half=125e12, tf32=None, fp32=15.7e12)),
)


def dense_peak_flops(device_name: str, precision: Precision, *, allow_tf32: bool = False) -> float | None:
    """Dense FLOP/s of a GPU by the name that its driver gives it; None for one that is not in the table.

    Args:
        device_name: such as `NVIDIA H100 80GB HBM3`.
        allow_tf32: float32 products may run on the tensor cores.
    """
    for pattern, peak in DENSE_PEAKS:
        if re.search(pattern, device_name.replace("-", " ")):
            if precision is not Precision.fp32:
                return peak.half
            return peak.tf32 if allow_tf32 and peak.tf32 is not None else peak.fp32
    return None
