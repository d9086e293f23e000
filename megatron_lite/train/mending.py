"""What DeepSpeed's optimizers do wrong in their first step, and in one in which fp16's loss scale changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_lite.errors import TrainingError


def defer_scale_update(optimizer: Any) -> Callable[[], None]:
    """Let ZeRO change fp16's loss scale after a step, not within it.

    DeepSpeed 0.19.8 updates the scale before it divides the gradients by it: in a step in which the scale doubles,
    every unclipped gradient would be halved. The returned function makes the update that the last step asked for.
    """
    asked: list[bool] = []
    original = optimizer._update_scale
    optimizer._update_scale = lambda has_overflow=False: asked.append(has_overflow)

    def update() -> None:
        for has_overflow in asked:
            try:
                original(has_overflow)
            except Exception as error:  # DeepSpeed raises nothing more specific
                raise TrainingError(
                    f"the gradients overflow fp16 even at a loss scale of train.loss_scale.minimum="
                    f"{optimizer.loss_scale:g} ({error}); use train.precision=bf16 or a lower optimizer.learning_rate"
                ) from error
        asked.clear()

    return update


def forget_empty_step(optimizer: Any) -> None:
    """Undo the step count of DeepSpeed's allocation step, which would shift Adam's bias correction."""
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        if "step" in state:
            state["step"] = torch.zeros_like(state["step"]) if torch.is_tensor(state["step"]) else 0
