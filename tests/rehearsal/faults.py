"""Faults that a rehearsal must catch, planted into the real code of the process that rehearses.

`FAULTS` says for each one which check is meant to catch it: a figure of `budget.py`, or `error` for an operation that
a device refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock


class Fault(NamedTuple):
    plant: Callable[[], Any]
    """Returns a context manager: while it is active, the fault is there."""
    caught_by: str


@contextmanager
def planted(fault: str | None) -> Iterator[None]:
    """None = no fault."""
    if fault is None:
        yield
        return
    with FAULTS[fault].plant():
        yield


def _around(owner: str, name: str, change: Callable[[Any], Any]) -> Any:
    """Replace a function by what `change` makes of it. `owner`: a module or `module:class`."""
    import importlib

    module, _, inner = owner.partition(":")
    holder = importlib.import_module(module)
    holder = getattr(holder, inner) if inner else holder
    return mock.patch.object(holder, name, change(getattr(holder, name)))


BLOCK = "megatron_lite.models.block:TransformerBlock"
ENGINE = "megatron_lite.engine.engine:Engine"
PIPELINED = "megatron_lite.engine.pipelined:PipelinedEngine"


def mask_on_the_cpu() -> Any:
    import torch

    def on_cpu(_: Any) -> Any:
        return lambda num_keys, lengths: (torch.arange(num_keys) < lengths[:, None])[:, None, None]

    return _around("megatron_lite.models.masks", "key_mask", on_cpu)


def accumulator_on_the_cpu() -> Any:
    import torch

    def on_cpu(_: Any) -> Any:
        def by_layer(self: Any, squares: Any) -> Any:
            return torch.zeros(len(self.layers), dtype=squares.dtype).index_add_(0, self._rows, squares)

        return by_layer

    return _around("megatron_lite.engine.gradient_norms:LayerMeter", "_by_layer", on_cpu)


def cpu_tensor_in_a_collective() -> Any:
    def on_cpu(original: Any) -> Any:
        return lambda self, sums, count: original(self, sums.cpu(), count)

    return _around(ENGINE, "_mean_over_job", on_cpu)


def synchronize_in_each_layer() -> Any:
    import torch

    def waiting(original: Any) -> Any:
        def forward(self: Any, *args: Any) -> Any:
            torch.cuda.synchronize()
            return original(self, *args)

        return forward

    return _around(BLOCK, "forward", waiting)


def item_in_a_hook() -> Any:
    def reading(original: Any) -> Any:
        def forward(self: Any, *args: Any) -> Any:
            out = original(self, *args)
            if out.requires_grad:
                out.register_hook(lambda grad: print(grad.sum().item()))
            return out

        return forward

    return _around(BLOCK, "forward", reading)


def pageable_copy_after_the_schedule() -> Any:
    def copying(original: Any) -> Any:
        def reduce(self: Any) -> None:
            next(iter(self.module.parameters())).detach()[:1].cpu()
            original(self)

        return reduce

    return _around(PIPELINED, "_reduce_over_data_parallel", copying)


def sum_over_the_wrong_group() -> Any:
    from dataclasses import replace

    def wrong(original: Any) -> Any:
        return lambda x, context: original(x, replace(context, tensor_group=context.data_group))

    return _around("megatron_lite.parallel.layers", "sum_partial", wrong)


def forgotten_activations() -> Any:
    kept: list[Any] = []

    def keeping(original: Any) -> Any:
        def forward(self: Any, *args: Any) -> Any:
            out = original(self, *args)
            kept.append(out.detach())
            return out

        return forward

    return _around(BLOCK, "forward", keeping)


def buffer_that_lives_through_the_step() -> Any:
    def allocating(original: Any) -> Any:
        def load(self: Any, *args: Any) -> None:
            self.forgotten = [parameter.float() for parameter in self.module.parameters()]
            original(self, *args)

        return load

    return _around(PIPELINED, "_load", allocating)


def copy_in_each_layer() -> Any:
    def copying(original: Any) -> Any:
        return lambda self, *args: original(self, *args).clone()

    return _around(BLOCK, "forward", copying)


def float64_in_each_norm() -> Any:
    import torch

    def exact(original: Any) -> Any:
        def forward(self: Any, x: Any) -> Any:
            weight, bias = self.weight.double(), self.bias.double()
            return torch.nn.functional.layer_norm(x.double(), x.shape[-1:], weight, bias, self.epsilon).to(x.dtype)

        return forward

    return _around("megatron_lite.models.norms:LayerNorm", "forward", exact)


def gradients_reduced_twice() -> Any:
    import torch.distributed as dist

    def twice(original: Any) -> Any:
        def reduce(self: Any) -> None:
            for parameter in self.module.parameters():
                dist.all_reduce(parameter.data, group=self.context.data_group)
            original(self)

        return reduce

    return _around(PIPELINED, "_reduce_over_data_parallel", twice)


def activations_summed_twice() -> Any:
    import torch.distributed as dist

    def twice(original: Any) -> Any:
        def sum_partial(x: Any, context: Any) -> Any:
            dist.all_reduce(x.detach(), group=context.tensor_group)
            return original(x, context)

        return sum_partial

    return _around("megatron_lite.parallel.layers", "sum_partial", twice)


FAULTS: dict[str, Fault] = {
    "mask_on_the_cpu": Fault(mask_on_the_cpu, "error"),
    "accumulator_on_the_cpu": Fault(accumulator_on_the_cpu, "error"),
    "cpu_tensor_in_a_collective": Fault(cpu_tensor_in_a_collective, "error"),
    "synchronize_in_each_layer": Fault(synchronize_in_each_layer, "waits_inside"),
    "item_in_a_hook": Fault(item_in_a_hook, "waits_inside"),
    "pageable_copy_after_the_schedule": Fault(pageable_copy_after_the_schedule, "waits_step"),
    "sum_over_the_wrong_group": Fault(sum_over_the_wrong_group, "wire_data"),
    "forgotten_activations": Fault(forgotten_activations, "left"),
    "buffer_that_lives_through_the_step": Fault(buffer_that_lives_through_the_step, "memory"),
    "copy_in_each_layer": Fault(copy_in_each_layer, "kernels"),
    "float64_in_each_norm": Fault(float64_in_each_norm, "kbytes"),
    "gradients_reduced_twice": Fault(gradients_reduced_twice, "wire_data"),
    "activations_summed_twice": Fault(activations_summed_twice, "wire_tensor"),
}
