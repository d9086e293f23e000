"""What DeepSpeed's optimizers do wrong in their first step, and in one in which fp16's loss scale changes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_lite.errors import LaunchError, TrainingError

DEEPSPEED_FLOOR = (0, 19, 3)


def require_right_deepspeed(version: str) -> None:
    """
    Raises:
        LaunchError: this DeepSpeed computes wrong gradients in a pipeline (its issues 7773 and 8152).
    """
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < DEEPSPEED_FLOOR:
        floor = ".".join(map(str, DEEPSPEED_FLOOR))
        raise LaunchError(
            f"deepspeed=={version} computes wrong gradients in a pipeline, scaled by its micro-batches; "
            f"pip install 'deepspeed>={floor}'"
        )


class DeferredScale:
    """Lets ZeRO change fp16's loss scale after a step, not within it.

    DeepSpeed 0.19.8 updates the scale before it divides the gradients by it: in a step in which the scale doubles,
    every unclipped gradient would be halved.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._asked: list[bool] = []
        self._original = optimizer._update_scale
        optimizer._update_scale = lambda has_overflow=False: self._asked.append(has_overflow)

    def make(self, dropped: bool) -> None:
        """The update that the last step asked for; none where the step was dropped for another reason than overflow.

        Raises:
            TrainingError: the scale would have to be lower than the smallest one.
        """
        asked, self._asked = self._asked, []
        for has_overflow in [] if dropped else asked:
            try:
                self._original(has_overflow)
            except Exception as error:  # DeepSpeed raises nothing more specific
                raise TrainingError(
                    f"the gradients overflow fp16 even at a loss scale of train.loss_scale.minimum="
                    f"{self._optimizer.loss_scale:g} ({error}); use train.precision=bf16 or a lower "
                    "optimizer.learning_rate"
                ) from error


def forget_empty_step(optimizer: Any) -> None:
    """Undo the step count of DeepSpeed's allocation step, which would shift Adam's bias correction."""
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        if "step" in state:
            state["step"] = torch.zeros_like(state["step"]) if torch.is_tensor(state["step"]) else 0


@contextmanager
def as_if_overflowed(optimizer: Any) -> Iterator[None]:
    """Within the block the optimizer's step does what it does with a gradient that is no number: it drops it.

    Each of DeepSpeed's optimizers has its own way to clear up after such a step, and its own place to see one.
    """

    def overflow(*_: Any, **__: Any) -> Any:
        optimizer.overflow = True
        return True

    no_number = torch.full((), float("nan"))
    replaced: dict[str, Any] = {  # of those that it has
        "check_overflow": overflow,  # ZeRO-1 and 2 ...
        "check_grad_overflow": True,  # ... which look only where they are told to
        "get_grads_for_norm": lambda **_: ([no_number], {}),  # bf16 under ZeRO-1
        "_overflow_check_and_loss_scale_update": overflow,  # ZeRO-3
    }
    before = {name: vars(optimizer).get(name, _ABSENT) for name in replaced if hasattr(optimizer, name)}
    for name in before:
        setattr(optimizer, name, replaced[name])
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _ABSENT:
                delattr(optimizer, name)
            else:
                setattr(optimizer, name, value)


_ABSENT = object()
