"""One entry of a model's layer list: the unit that a pipeline stage holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class LayerSpec:
    """A layer by its global name, and how to make and apply it."""

    name: str
    """Prefix of its parameters' global names: "embedding", "layers.0", ..., "head"."""
    build: Callable[[], nn.Module]
    """Makes the module, initialised and with global names set."""
    tied: str | None = None
    """Entries with the same key share one module, built from the first of them."""
    forward: Callable[[nn.Module, Tensor], Tensor] | None = None
    """How this entry applies a shared module, through module(...) so that ZeRO-3's hooks run; None = module(x)."""
