"""Hooks into a train step, passed to the engine's constructor."""

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
    grad_norm: float  # of the whole model, before clipping, not scaled
    loss_scale: float  # with which the gradients were computed; 1 unless fp16


def _nothing(*_: object) -> None:
    """The default of hooks that return nothing."""


@dataclass(frozen=True)
class EngineHooks:
    """Every hook is called on all ranks, so it may be a collective of all ranks."""

    between_micro_batches: Callable[[], None] = _nothing
    """Between two ticks of a schedule, of training and of evaluation, equally often on every rank. It may raise:
    weights and optimizer are then those of the last finished step and can be saved, but this engine can train no
    further."""
    after_reduction: Callable[[Engine], None] = _nothing
    """After the last reduction of a step and before its norm is measured: `Engine.full_gradients` works here alone."""
    before_update: Callable[[PendingUpdate], bool] | None = None
    """Returns True to skip the update. None = no update is skipped, and no step waits for the device before it."""
