"""Where others come into a train step: handed to the engine's constructor, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_lite.engine.engine import Engine


@dataclass(frozen=True)
class PendingUpdate:
    """A step whose gradients are complete and whose update has not been made; equal on every rank."""

    loss: float  # nats per token, mean over the global batch
    grad_norm: float  # of the whole model, before clipping, not scaled
    loss_scale: float  # that the gradients were computed with; 1 unless fp16


def _nothing(*_: object) -> None:
    """The default of hooks that return nothing."""


@dataclass(frozen=True)
class EngineHooks:
    """Each is called on every rank alike, so a hook may be a collective of all ranks."""

    between_micro_batches: Callable[[], None] = _nothing
    """Between two ticks of a schedule, of training and of evaluation, equally often on every rank. It may raise:
    weights and optimizer are then those of the last finished step and can be saved, but this engine can train no
    further."""
    after_reduction: Callable[[Engine], None] = _nothing
    """After the last reduction of a step and before its norm is measured: `Engine.full_gradients` works here alone."""
    before_update: Callable[[PendingUpdate], bool] | None = None
    """True drops the update. None = every update is made, and nothing waits for the device before it."""
