"""The result of a step: on the device as soon as the step is launched, on the host when it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step; equal on every rank."""

    loss: float  # of the objective, mean over the whole global batch: nats per token, plus nats per sample with a class
    token_loss: float  # nats per token, without the samples' classes
    grad_norm: float  # of the whole gradient before clipping
    skipped: bool  # no update: the gradient was not finite, or a hook skipped it
    loss_scale: float  # of the next step; 1 unless fp16
    measures: Mapping[str, float]  # those of `observe.step_measures.STEP_MEASURES` that this run computes, by name


class LaunchedStep:
    """A step whose kernels are launched and may still be running on the device.

    Its figures are on their way to page-locked host memory behind these kernels, so that reading them waits for this
    step only, and not for what is launched after it.
    """

    def __init__(
        self, figures: Tensor, result_of: Callable[[list[float]], StepResult], sequences: Sequence[Tensor] = ()
    ) -> None:
        """
        Args:
            figures: [figures] fp64, on the device.
            result_of: makes the result of these figures on the host.
            sequences: `TokenLoss.sequences` of this step.
        """
        self._result_of = result_of
        self.sequences = sequences
        self._arrived: torch.cuda.Event | None = None
        self._figures = figures
        if figures.is_cuda:
            self._figures = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
            self._figures.copy_(figures, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> StepResult:
        """Wait until the device has finished the step."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._result_of(self._figures.tolist())
