"""Stochastic gradient descent with momentum and decoupled weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class DecoupledSGD(torch.optim.Optimizer):
    """`v = momentum * v + g; p = p * (1 - lr * weight_decay) - lr * v` (SGDW, arXiv 1711.05101, algorithm 1).

    torch.optim.SGD adds the decay to the gradient instead, so that momentum spreads it over later steps; in this
    project weight decay is decoupled for every optimizer. The first velocity is the first gradient.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            directions = self._directions(params, group["momentum"])
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, directions, alpha=-group["lr"])
        return loss

    def _directions(self, params: list[torch.Tensor], momentum: float) -> list[torch.Tensor]:
        gradients = [parameter.grad for parameter in params]
        if momentum == 0.0:
            return gradients
        for parameter in params:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        velocities = [self.state[parameter]["momentum_buffer"] for parameter in params]
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, gradients)
        return velocities
