"""Weights of Hugging Face models under our global names, as full tensors.

Pure functions of a state dict. They only rename, transpose and join, so they map a dictionary of gradients as well.

Shapes: h hidden, n attention heads, g query groups, d head size, f inner channels of the MLP.
"""

from megatron_lite.models.hf.decoders import from_gpt2, from_llama
from megatron_lite.models.hf.encoder_decoders import from_bart, from_t5
from megatron_lite.models.hf.encoders import from_bert, from_roberta

__all__ = ["from_bart", "from_bert", "from_gpt2", "from_llama", "from_roberta", "from_t5"]
