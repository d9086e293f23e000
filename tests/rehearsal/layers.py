"""Models of real size, of which one layer is counted: its kernels, bytes and FLOPs.

The rehearsal needs no more time for a large tensor than for a small one.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_lite.config.derived import resolve
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import (
    Architecture,
    DataConfig,
    ObjectiveConfig,
    ObjectiveName,
    ParallelConfig,
    Precision,
    RunConfig,
    TrainConfig,
)
from tests.rehearsal.cases import VOCAB_SIZE
from tests.tiny_models import BERT, GPT2, LLAMA, T5_V1_1

HIDDEN_SIZE, HEADS, LENGTH, MICRO_BATCH = 2048, 16, 1024, 4  # those of GPT-3 1.3B; sequences are half as long
_MODELS = {
    "gpt2": (GPT2, "causal_lm"),
    "llama": (LLAMA, "causal_lm"),
    "bert": (BERT, "masked_lm"),
    "t5_v1_1": (T5_V1_1, "ul2"),
}
"""With an objective whose lengths two ranks can share."""
_LAYOUTS = {"tp1": (1, False), "tp2": (2, False), "tp2_sp": (2, True)}
LAYERS = {f"{family}-{layout}": (family, layout) for family in _MODELS for layout in _LAYOUTS if layout != "tp2"}
LAYERS |= {"llama-tp2": ("llama", "tp2")}
"""Name -> family and layout."""


def layer_config(name: str, layers: int) -> ResolvedConfig:
    """One micro-batch in bf16; an encoder-decoder has as many layers of each kind."""
    family, layout = LAYERS[name]
    tensor, sequence_parallel = _LAYOUTS[layout]
    sizes = {"hidden_size": HIDDEN_SIZE, "num_attention_heads": HEADS, "head_size": HIDDEN_SIZE // HEADS}
    model, objective = _MODELS[family]
    model = replace(model, **sizes, ffn_hidden_size=None, num_layers=layers)
    if model.architecture is Architecture.encoder_decoder:
        model = replace(model, num_decoder_layers=layers)
    config = RunConfig(
        model=replace(model, max_position_embeddings=LENGTH, vocab_size=VOCAB_SIZE, vocab_pad_multiple=128),
        objective=ObjectiveConfig(name=ObjectiveName(objective)),
        data=DataConfig(seq_length=LENGTH),
        parallel=ParallelConfig(data_parallel_size=1, tensor_parallel_size=tensor, sequence_parallel=sequence_parallel),
        train=TrainConfig(precision=Precision.bf16, micro_batch_size=MICRO_BATCH, global_batch_size=MICRO_BATCH),
    )
    return resolve(config, device="cuda")
