"""Maps transformers' config.json to our settings and back."""

from megatron_lite.config.hf.export import generation_config, hf_config
from megatron_lite.config.hf.families import counterpart
from megatron_lite.config.hf.family import Family, NoCounterpart, TokenRoles
from megatron_lite.config.hf.settings import Described, settings_of

__all__ = [
    "Described",
    "Family",
    "NoCounterpart",
    "TokenRoles",
    "counterpart",
    "generation_config",
    "hf_config",
    "settings_of",
]
