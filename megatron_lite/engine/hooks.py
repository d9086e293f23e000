"""Hooks into a train step; they are passed to the engine's constructor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_lite.engine.engine import Engine


@dataclass(frozen=True)
class PendingUpdate:
    """A step with complete gradients, before its update; equal on every rank."""

    loss: float  # nats per token, mean over the global batch
    grad_norm: float  # of the whole model, before clipping, without the loss scale
    loss_scale: float  # that the gradients were computed with; 1 unless fp16


def _nothing(*_: object) -> None:
    """The default of hooks that return nothing."""


@dataclass(frozen=True)
class EngineHooks:
    """Every hook is called on all ranks at the same point, so it may run collectives of all ranks."""

    between_micro_batches: Callable[[], None] = _nothing
    """Called between two ticks of a training or evaluation schedule, equally often on every rank. It may raise: weights
    and optimizer are then those of the last finished step and can be saved, but this engine cannot train any further.
    """
    after_reduction: Callable[[Engine], None] = _nothing
    """Called after the last gradient reduction of a step and before the norm is measured: the only place where
    `Engine.full_gradients` works."""
    before_update: Callable[[PendingUpdate], bool] | None = None
    """Returns True to skip the update. None = no update is skipped, and the host does not wait for the device before
    it."""
