"""Where the gradient of a parameter is summed over the micro-batches of a step."""

from __future__ import annotations

import torch
from torch import Tensor


class GradientSink:
    """Sums the gradient of one parameter over the micro-batches of a step, in memory that the engine chooses.

    Autograd would give each micro-batch's gradient a tensor of its own and add that to `Parameter.grad`. A layer whose
    weight has a sink in use instead lets the matrix product write into the sum, and returns no gradient: one pass over
    the sum less for each micro-batch, no second tensor of the weight's size, and sums in the dtype of the sink, which
    may be fp32 where the weight is bf16.

    Every parameter has a sink (`sharding.mark`); until the engine binds memory to it, it is not in use.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._is_empty = True

    def bind(self, total: Tensor) -> None:
        """Use this tensor of the parameter's shape from now on. Its content does not count."""
        self._total, self._is_empty = total, True

    @property
    def in_use(self) -> bool:
        return self._total is not None

    @property
    def total(self) -> Tensor:
        """The sum of the step so far; meaningless before the first addition, see `complete`."""
        assert self._total is not None, "bind it first"
        return self._total

    def clear(self) -> None:
        """Begin a new step. The first addition overwrites, so nothing is zeroed."""
        self._is_empty = True

    def complete(self) -> None:
        """At the end of a step: a parameter that no micro-batch reached has the gradient zero."""
        if self._is_empty:
            self.total.zero_()
            self._is_empty = False

    @torch.no_grad()
    def add(self, gradient: Tensor) -> None:
        """Add a gradient of the parameter's shape."""
        gradient = gradient.view_as(self.total)
        self.total.copy_(gradient) if self._is_empty else self.total.add_(gradient)
        self._is_empty = False

    @torch.no_grad()
    def add_product(self, rows: Tensor, x: Tensor) -> None:
        """Add rows^T x, the gradient of a weight [..., o, i] in y = x W^T.

        Args:
            rows: [n, o], the gradient of y.
            x: [n, i]
        """
        total = self.total.view(-1, x.shape[-1])
        if total.dtype is rows.dtype:
            torch.mm(rows.t(), x, out=total) if self._is_empty else total.addmm_(rows.t(), x)
        elif total.is_cuda:  # tensor cores add in fp32 anyway, so the sum costs no pass of its own
            if self._is_empty:
                torch.mm(rows.t(), x, out_dtype=total.dtype, out=total)
            else:
                torch.addmm(total, rows.t(), x, out_dtype=total.dtype, out=total)
        else:
            self.add(rows.t() @ x)
        self._is_empty = False
