"""Adafactor (arXiv 1804.04235), factored and exact under tensor parallelism.

A matrix's second moment is kept as the means of its rows and its columns, R + C numbers instead of R x C. Under tensor
parallelism a rank holds a slice of the matrix. The means, the RMS of the update and the RMS of the parameter are still
those of the full, unpadded tensor: partial sums of all parameters are combined in two small all-reduces per step.

Shapes: R, C the last two dimensions of the local, unpadded slice; `...` leading dimensions, each with its own factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lite.errors import ConfigError


class Adafactor(torch.optim.Optimizer):
    """Algorithms 4 and 6 of the paper without momentum, with an external step size.

    With k the step counted from 1, g the gradient and x the parameter:

    - beta2 = 1 - k^-0.8 (section 7.2), so that no bias correction is needed;
    - V = beta2 V + (1 - beta2)(g^2 + epsilon1); with two or more dimensions factored: row means times column means over
      their common mean (section 3);
    - u = g / sqrt(V), divided by max(1, RMS(u) / clip) (section 6);
    - x = x (1 - lr weight_decay) - lr max(epsilon2, RMS(x)) u (section 8); the schedule sets `lr` instead of the
      relative step size of section 9.

    Args:
        params: parameters or groups; fp32. A parameter may carry `shard_spec` (`parallel.sharding.ShardSpec`).
        tensor_group: the ranks that hold the other slices; all of them must call `step`.
    Raises:
        ConfigError: parameters are not fp32; in `step`, if parameters have been replaced since construction (ZeRO
            replaces them by flat shards, which have no rows and columns).
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        tensor_group: dist.ProcessGroup | None = None,
        weight_decay: float = 0.0,
        epsilon1: float = 1e-30,
        epsilon2: float = 1e-3,
        clip: float = 1.0,
        decay_power: float = 0.8,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.tensor_group = tensor_group
        self.epsilon1, self.epsilon2, self.clip, self.decay_power = epsilon1, epsilon2, clip, decay_power
        self._known = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dtype is not torch.float32:
                    raise ConfigError(
                        f"optimizer.name=adafactor keeps its statistics in fp32 and got {parameter.dtype} parameters; "
                        "use train.precision=fp32 or optimizer.name=adamw"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        slices = list(self._slices())
        if not slices:
            return loss
        self._update_statistics(slices)
        self._measure_updates(slices)
        square_sums = torch.stack([torch.stack([part.value_square_sum, part.update_square_sum]) for part in slices])
        for part, (value_sum, update_sum) in zip(slices, square_sums.tolist(), strict=True):  # one synchronisation
            scale = part.lr * max(self.epsilon2, part.rms(value_sum))
            scale /= max(1.0, part.rms(update_sum) / self.clip)
            part.value.mul_(1.0 - part.lr * part.weight_decay)
            part.value.add_(part.update(), alpha=-scale)
        return loss

    def _slices(self) -> Iterable[_Slice]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in self._known:
                    raise ConfigError(
                        "optimizer.name=adafactor needs whole matrices, which ZeRO flattens; "
                        "use parallel.zero_stage=0 or optimizer.name=adamw"
                    )
                if parameter.grad is not None:
                    yield _Slice.of(parameter, self.state[parameter], group, self.tensor_group)

    def _update_statistics(self, slices: list[_Slice]) -> None:
        """Update every second moment for this step, and compute the parameters' sums of squares."""
        reduction = _Reduction(self.tensor_group)
        for part in slices:
            square = part.gradient.square().add_(self.epsilon1)  # [..., R, C]
            if part.factored:
                part.new["row"] = square.sum(-1)  # [..., R]
                part.new["column"] = square.sum(-2)  # [..., C]
            else:
                part.new["square"] = square
            part.value_square_sum = part.value.square().sum()
            if part.sharded_dim is not None:
                reduction.add(part.value_square_sum)
            if part.factored and part.sharded_dim == -1:
                reduction.add(part.new["row"])
            if part.factored and part.sharded_dim == -2:
                reduction.add(part.new["column"])
        reduction.run()
        for part in slices:
            part.advance(self.decay_power)

    def _measure_updates(self, slices: list[_Slice]) -> None:
        reduction = _Reduction(self.tensor_group)
        for part in slices:
            part.update_square_sum = part.update().square_().sum()
            if part.sharded_dim is not None:
                reduction.add(part.update_square_sum)
        reduction.run()


@dataclass
class _Slice:
    """This rank's unpadded part of one parameter during one step."""

    value: Tensor  # [..., R, C], a view into the parameter
    gradient: Tensor  # [..., R, C]
    full_shape: tuple[int, ...]
    sharded_dim: int | None  # counted from the end: -1 columns, -2 rows; None = replicated on every rank
    state: dict[str, Any]
    lr: float
    weight_decay: float
    new: dict[str, Tensor] = field(default_factory=dict)  # this step's sums of squares, by the name of their state
    value_square_sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    update_square_sum: Tensor = field(default_factory=lambda: torch.zeros(()))

    @classmethod
    def of(
        cls, parameter: Tensor, state: dict[str, Any], group: dict[str, Any], tensor_group: dist.ProcessGroup | None
    ) -> _Slice:
        spec = getattr(parameter, "shard_spec", None)
        full_shape = tuple(spec.full_shape) if spec is not None else tuple(parameter.shape)
        value, gradient = parameter.detach(), parameter.grad
        assert gradient is not None
        sharded_dim = None
        if spec is not None and spec.dim is not None:
            rank = dist.get_rank(tensor_group) if tensor_group is not None else 0
            local = value.shape[spec.dim]
            valid = min(max(full_shape[spec.dim] - rank * local, 0), local)
            value, gradient = value.narrow(spec.dim, 0, valid), gradient.narrow(spec.dim, 0, valid)
            if tensor_group is not None:
                sharded_dim = spec.dim - len(full_shape)
        return cls(value, gradient, full_shape, sharded_dim, state, group["lr"], group["weight_decay"])

    @property
    def factored(self) -> bool:
        return self.value.ndim >= 2

    def advance(self, decay_power: float) -> None:
        """state = beta2 state + (1 - beta2) mean of the squares; the first step has beta2 = 0."""
        step = self.state["step"] = self.state.get("step", 0) + 1
        lengths = {"row": self.full_shape[-1], "column": self.full_shape[-2]} if self.factored else {"square": 1}
        for name, length in lengths.items():
            mean = self.new.pop(name).div_(length)
            if step == 1:
                self.state[name] = mean
            else:
                self.state[name].lerp_(mean, step**-decay_power)

    def update(self) -> Tensor:
        """g / sqrt(V) before clipping, [..., R, C]; a new tensor."""
        if not self.factored:
            return self.gradient * self.state["square"].rsqrt()
        row, column = self.state["row"], self.state["column"]  # [..., R], [..., C]
        # The mean over rows of the row means equals the mean over columns of the column means: use the one that this
        # rank holds in full.
        mean = (column if self.sharded_dim == -2 else row).mean(-1, keepdim=True)  # [..., 1]
        return self.gradient * (row / mean).rsqrt_().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)

    def rms(self, square_sum: float) -> float:
        return math.sqrt(square_sum / max(math.prod(self.full_shape), 1))


class _Reduction:
    """Sums many small tensors over a group, in place, with one all-reduce."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.parts: list[Tensor] = []

    def add(self, part: Tensor) -> None:
        self.parts.append(part)

    def run(self) -> None:
        if self.group is None or not self.parts:
            return
        flat = torch.cat([part.reshape(-1) for part in self.parts])
        dist.all_reduce(flat, group=self.group)
        for part, total in zip(self.parts, flat.split([part.numel() for part in self.parts]), strict=True):
            part.copy_(total.view_as(part))
