"""Maps our weights to those of transformers' models, in both directions: one list of boxes per family."""

from megatron_lite.config.hf.family import NoCounterpart
from megatron_lite.models.hf.forms import find_name, locate, stored_form

__all__ = ["NoCounterpart", "find_name", "locate", "stored_form"]
