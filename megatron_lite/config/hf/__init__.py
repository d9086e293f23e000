"""Models of transformers by their config.json: which one ours is, and which of ours one is."""

from megatron_lite.config.hf.families import Family, NoCounterpart, counterpart

__all__ = ["Family", "NoCounterpart", "counterpart"]
