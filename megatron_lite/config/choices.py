"""The values of the settings that are one of a few names; the comment behind a name is its meaning in `explain`."""

from __future__ import annotations

from enum import StrEnum


class Architecture(StrEnum):
    decoder = "decoder"  # each position sees those before it: GPT-2, LLaMA
    encoder = "encoder"  # each position sees all: BERT, RoBERTa
    encoder_decoder = "encoder_decoder"  # T5, BART


class Normalization(StrEnum):
    layernorm = "layernorm"
    rmsnorm = "rmsnorm"


class NormPlacement(StrEnum):
    pre = "pre"  # before attention and MLP, and once more after the last layer: GPT-2, LLaMA, T5
    post = "post"  # of each sum with the residual: BERT, RoBERTa, BART


class Activation(StrEnum):
    relu = "relu"
    gelu = "gelu"  # exact, by the error function
    gelu_tanh = "gelu_tanh"  # GPT-2's tanh approximation
    swiglu = "swiglu"  # silu(gate) * up, three matrices (arXiv 2002.05202)
    geglu = "geglu"  # gelu_tanh(gate) * up (T5 v1.1)

    @property
    def is_gated(self) -> bool:
        return self in (Activation.swiglu, Activation.geglu)


class PositionEmbedding(StrEnum):
    learned = "learned"
    rotary = "rotary"  # arXiv 2104.09864, half-rotation as in GPT-NeoX and LLaMA
    relative = "relative"  # a learned bias on attention scores by distance, shared by all layers of a stack (T5)


class InitScheme(StrEnum):
    normal = "normal"  # N(0, init_std); into the residual stream / sqrt(2 layers), 3 with cross-attention (GPT-2)
    plain = "plain"  # N(0, init_std) for all (BERT, RoBERTa, BART)
    t5 = "t5"  # by fan-in, with 1 / sqrt(head_size) folded into the query (arXiv 1910.10683)


class CheckInit(StrEnum):
    auto = "auto"
    always = "always"
    never = "never"


class Recompute(StrEnum):
    none = "none"
    selective = "selective"  # the core attention only (arXiv 2205.05198)
    full = "full"  # every transformer layer from its input


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Compile(StrEnum):
    none = "none"
    blocks = "blocks"  # each transformer layer, one graph for each kind


class ObjectiveName(StrEnum):
    causal_lm = "causal_lm"
    prefix_lm = "prefix_lm"
    fill_in_the_middle = "fill_in_the_middle"
    masked_lm = "masked_lm"
    masked_lm_nsp = "masked_lm_nsp"
    span_corruption = "span_corruption"
    bart_denoising = "bart_denoising"
    ul2 = "ul2"


class OptimizerName(StrEnum):
    adamw = "adamw"
    sgd = "sgd"
    adafactor = "adafactor"


class WandbMode(StrEnum):
    disabled = "disabled"
    auto = "auto"  # online when the user is logged in, offline otherwise
    offline = "offline"
    online = "online"
