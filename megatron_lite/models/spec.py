"""One entry of a model's layer list: the unit that a pipeline stage holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from megatron_lite.models.activations import Activations
from megatron_lite.models.fields import Field
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.sharding import initialise, set_global_names


@dataclass(frozen=True)
class LayerSpec:
    """A layer with its global name, and how to build and apply it."""

    name: str
    """Prefix of its parameters' global names: "embedding", "layers.0", ..., "head"."""
    build: Callable[[], nn.Module]
    """Makes the module, initialised and with global names set."""
    apply: Callable[[Any, Activations], Activations]
    """Applies the module to the activations, by calling module(...) so that ZeRO-3's hooks run."""
    tied: str | None = None
    """Entries with the same key share one module, built from the first of them."""
    stage_inputs: tuple[Field, ...] | None = None
    """What this entry and those after it need from the entries before it, where a pipeline stage may begin here; on the
    first entry, the batch's fields. None = no stage begins here."""


def layer_spec(
    name: str,
    make: Callable[[], nn.Module],
    apply: Callable[[Any, Activations], Activations],
    context: ParallelContext,
    *,
    tied: str | None = None,
    stage_inputs: tuple[Field, ...] | None = None,
) -> LayerSpec:
    """An entry for a module that `make` creates; initialisation and global names are added here."""
    return LayerSpec(name, partial(_build, make, name, context), apply, tied, stage_inputs)


def _build(make: Callable[[], nn.Module], name: str, context: ParallelContext) -> nn.Module:
    module = make()
    set_global_names(module, name)
    initialise(module, name, context.seed, context)
    return module
