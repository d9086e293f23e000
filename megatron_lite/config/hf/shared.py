"""What several families have in common."""

from __future__ import annotations

from typing import Any

from megatron_lite.config.schema import Activation, Normalization, NormPlacement, PositionEmbedding

ACTIVATIONS = {
    "gelu_new": Activation.gelu_tanh,
    "gelu_pytorch_tanh": Activation.gelu_tanh,
    "gelu_fast": Activation.gelu_tanh,
    "gelu": Activation.gelu,
    "relu": Activation.relu,
}
PLAIN_HEAD: dict[str, tuple[Any, ...]] = {"head_transform": (False,), "head_bias": (False,)}
ADDITIVE: dict[str, tuple[Any, ...]] = {  # from before rotary positions
    "normalization": (Normalization.layernorm,),
    "position_embedding": (PositionEmbedding.learned,),
    "attention_bias": (True,),
    "mlp_bias": (True,),
    "scale_tied_head": (False,),
}
POST_NORM: dict[str, tuple[Any, ...]] = {
    "norm_placement": (NormPlacement.post,),
    "embedding_norm": (True,),
    "attention_scale": (True,),
}

EVERYWHERE: dict[str, tuple[Any, ...]] = {
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
    "cross_attention_hidden_size": (None,),
}
"""Demands on the config.json of every family."""
CAUSAL: dict[str, tuple[Any, ...]] = {**EVERYWHERE, "is_causal": (True,)}
NO_WINDOW: dict[str, tuple[Any, ...]] = {"sliding_window": (None,), "use_sliding_window": (False,)}

GENERATED = {"bos_token_id": ("bos",), "eos_token_id": ("eos", "eod"), "pad_token_id": ("pad",)}
"""Roles of the tokens of a decoder."""
