"""FLOPs that a model needs per token, term by term, and the dense peak FLOP/s of GPUs that they are compared to.

Only matrix products count, a multiply-add as two. A training step costs three forward passes: one forward and two in
the backward pass (for the inputs and for the weights). Recomputation is not counted: it is work that the layout
costs, not work that the model needs (MFU, not HFU; PaLM, arXiv 2204.02311, appendix B).

Attention counts only the scores that the model needs. In a decoder, position i attends to i + 1 positions, (s + 1) / 2
on average; in an encoder, and in cross-attention, each attends to all. PaLM and nanoGPT count the full square for
decoders too; `causal=False` gives their figure. A prefix LM counts as causal: what its prefix adds, a third of the
scores on average, differs by sample. A head counts for every position of its stack, even where few are predicted.
Embeddings are look-ups, and a next-sentence head reads one position per sample: neither counts.

A token is a position that the model reads (`ResolvedConfig.tokens_per_sample`).

Legend: h hidden size, n heads, g query groups, d head size, f inner width of the MLP, v vocabulary, L layers, s
sequence length of a single stack. An encoder_decoder has L layers on s positions and M on r; its terms are means
over s + r.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_lite.config.resolved import ResolvedConfig, ResolvedModel
from megatron_lite.config.schema import Architecture, Precision

PASSES = 3  # forward, gradient of the inputs, gradient of the weights


@dataclass(frozen=True)
class FlopsPerToken:
    """Forward FLOPs of one token through all layers, by term."""

    query_key_value: float
    """2 L h (n + 2g) d."""
    attention_scores: float
    """Scores and weighted sum: 2 L n d (s + 1) with causal attention, 4 L n d s for the full square."""
    projection: float
    """2 L n d h."""
    cross_attention: float
    """M (4 h n d r + 4 h g d s + 4 n d r s) / (s + r): query and projection, key and value, scores and weighted sum."""
    mlp: float
    """4 L h f, or 6 L h f with a gate."""
    head: float
    """2 h v, and 2 h^2 for a transform before it."""

    @property
    def forward(self) -> float:
        return (
            self.query_key_value + self.attention_scores + self.projection + self.cross_attention + self.mlp + self.head
        )

    @property
    def training(self) -> float:
        return PASSES * self.forward


def itemised_flops(
    model: ResolvedModel, seq_length: int, vocab_size: int, *, decoder_seq_length: int = 0, causal: bool = True
) -> FlopsPerToken:
    """Forward FLOPs per token.

    Args:
        seq_length: positions of the single stack, or of the encoder.
        vocab_size: true vocabulary; the model does not need padded columns of the head.
        decoder_seq_length: positions of an encoder_decoder's decoder; 0 = no decoder stack.
        causal: count only the scores below the diagonal of a decoder.
    """
    first, second = seq_length, decoder_seq_length
    layers, decoder_layers = model.num_layers, model.decoder_layers
    hidden, heads = model.hidden_size, model.num_attention_heads * model.head_size
    keys_and_values = 2 * model.num_query_groups * model.head_size
    positions = layers * first + decoder_layers * second  # per sample, counted once per layer
    first_is_causal = causal and model.architecture is Architecture.decoder
    pairs = layers * _pairs(first, causal=first_is_causal) + decoder_layers * _pairs(second, causal=causal)
    cross_weights = hidden * (2 * heads * second + keys_and_values * first)
    transform = hidden * hidden if model.head_transform else 0
    matrices = 3 if model.activation.is_gated else 2
    per_token = 2 / (first + second)  # two FLOPs per multiply-add
    return FlopsPerToken(
        query_key_value=per_token * positions * hidden * (heads + keys_and_values),
        attention_scores=per_token * 2 * heads * pairs,
        projection=per_token * positions * heads * hidden,
        cross_attention=per_token * decoder_layers * (cross_weights + 2 * heads * first * second),
        mlp=per_token * positions * matrices * hidden * model.ffn_hidden_size,
        head=per_token * (second or first) * (hidden * vocab_size + transform),
    )


def _pairs(length: int, *, causal: bool) -> float:
    """Number of (query, key) pairs whose scores count."""
    return length * (length + 1) / 2 if causal else length * length


def flops_per_token(model: ResolvedModel, seq_length: int, vocab_size: int, *, decoder_seq_length: int = 0) -> float:
    """FLOPs of one token's forward and backward pass: the numerator of MFU."""
    return itemised_flops(model, seq_length, vocab_size, decoder_seq_length=decoder_seq_length).training


def flops_of_run(config: ResolvedConfig, vocab_size: int) -> FlopsPerToken:
    """Forward FLOPs per token of this configuration: objective and model decide its two lengths."""
    return itemised_flops(config.model, config.data.seq_length, vocab_size, decoder_seq_length=config.decoder_length)


@dataclass(frozen=True)
class DensePeak:
    """Dense FLOP/s of one device. For tensor cores, data sheets print twice as much: the 2:4 sparse figure."""

    half: float
    """bf16 and fp16 with fp32 accumulation; fp16 only where there is no bf16."""
    tf32: float | None
    fp32: float
    """Without tensor cores: what torch uses for float32 unless TF32 is allowed."""


# Sources: NVIDIA's data sheets of each product (V100 2020, A100 2021, A10 and A10G 2021, A6000 2020, T4 2018, L4 and
# L40S 2023, H100 2023, H200 and H200 NVL 2024, GH200 2023, H20 2024, HGX B200 and GB200 2024) and "NVIDIA Ada GPU
# Architecture", appendix A, for the RTX 4090; sparse figures halved. A800 and H800 are an A100 and an H100 with slower
# links. The first match counts.
DENSE_PEAKS: tuple[tuple[str, DensePeak], ...] = (
    (r"\bGB200\b", DensePeak(half=2500e12, tf32=1250e12, fp32=80e12)),
    (r"\bB200\b", DensePeak(half=2250e12, tf32=1125e12, fp32=75e12)),
    (r"\bH200 NVL\b", DensePeak(half=835.5e12, tf32=417.5e12, fp32=60e12)),
    (r"\bG?H200\b", DensePeak(half=989.4e12, tf32=494.7e12, fp32=66.9e12)),
    (r"\bH[18]00 PCIe\b", DensePeak(half=756e12, tf32=378e12, fp32=51e12)),
    (r"\bH100 NVL\b", DensePeak(half=835e12, tf32=417.5e12, fp32=60e12)),
    (r"\bH[18]00\b", DensePeak(half=989.4e12, tf32=494.7e12, fp32=66.9e12)),
    (r"\bH20\b", DensePeak(half=148e12, tf32=74e12, fp32=44e12)),
    (r"\bA[18]00\b", DensePeak(half=312e12, tf32=156e12, fp32=19.5e12)),
    (r"\bA10G\b", DensePeak(half=70e12, tf32=35e12, fp32=35e12)),
    (r"\bA10\b", DensePeak(half=125e12, tf32=62.5e12, fp32=31.2e12)),
    (r"\bRTX A6000\b", DensePeak(half=154.8e12, tf32=77.4e12, fp32=38.7e12)),
    (r"\bL40S\b", DensePeak(half=362e12, tf32=183e12, fp32=91.6e12)),
    (r"\bL4\b", DensePeak(half=121e12, tf32=60e12, fp32=30.3e12)),
    (r"\bRTX 4090\b", DensePeak(half=165.2e12, tf32=82.6e12, fp32=82.6e12)),
    (r"\bV100\b", DensePeak(half=125e12, tf32=None, fp32=15.7e12)),
    (r"\bT4\b", DensePeak(half=65e12, tf32=None, fp32=8.1e12)),
)


def dense_peak_flops(device_name: str, precision: Precision, *, allow_tf32: bool = False) -> float | None:
    """Dense FLOP/s of a GPU, by the name that its driver reports; None if it is not in the table.

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
