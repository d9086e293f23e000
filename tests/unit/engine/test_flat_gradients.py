"""Gradients of ZeRO-1 in flat tensors, on the smallest thing that has the attributes of DeepSpeed's optimizers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.engine.flat_gradients import FlatGradients, flat_gradients_of
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.parallel.gradient_sink import GradientSink
from megatron_lite.parallel.layers import ColumnParallelLinear
from megatron_lite.parallel.sharding import Init

SHAPES = ((3, 2), (4,))
PADDED = 12  # 10 elements, and 2 of padding


def parameters_of(dtype: torch.dtype) -> tuple[list[nn.Parameter], Tensor]:
    """Two parameters that are views of one flat tensor, as DeepSpeed makes them."""
    flat, made, start = torch.zeros(PADDED, dtype=dtype), [], 0
    for shape in SHAPES:
        size = torch.Size(shape).numel()
        parameter = nn.Parameter(flat.narrow(0, start, size).view(shape))
        parameter.gradient_sink = GradientSink()
        made.append(parameter)
        start += size
    return made, flat


def optimizer_of(dtype: torch.dtype) -> tuple[Any, list[nn.Parameter]]:
    parameters, flat = parameters_of(dtype)
    if dtype is torch.bfloat16:
        gradients = torch.full((PADDED,), float("nan"))  # what an earlier step has left does not count
        fake = SimpleNamespace(
            bf16_groups=[parameters], bf16_groups_flat=[flat], fp32_groups_gradients_flat=[gradients]
        )
    else:
        fake = SimpleNamespace(
            bit16_groups=[parameters], bit16_groups_flat=[flat], params_in_partition=[parameters], averaged_gradients={}
        )
    return fake, parameters


def micro_batch(optimizer: Any, gradients: FlatGradients, *values: float | None) -> None:
    """Autograd leaves these gradients; None = the micro-batch does not reach that parameter."""
    groups = getattr(optimizer, "bf16_groups", None)
    parameters = (groups or optimizer.bit16_groups)[0]
    for place, (parameter, value) in enumerate(zip(parameters, values, strict=True)):
        if value is not None:
            new = torch.full_like(parameter, value)
            parameter.grad = new if parameter.grad is None else parameter.grad + new
        if groups is not None:
            optimizer._update_hp_grad(parameter, 0, place, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_step_are_the_sum_of_its_micro_batches(dtype: torch.dtype) -> None:
    optimizer, _ = optimizer_of(dtype)
    gradients = flat_gradients_of(optimizer, ParallelContext.single())
    for _ in range(2):  # the second step begins with what the first has left
        micro_batch(optimizer, gradients, 1.0, 2.0)
        micro_batch(optimizer, gradients, 2.0**-9, 0.5)  # lost in bf16
        gradients.complete()
        gradients.reduce()
        (partition,) = gradients.partitions
        assert partition[:10].tolist() == [1 + 2.0**-9] * 6 + [2.5] * 4
        gradients.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_that_a_step_does_not_reach_has_gradient_zero(dtype: torch.dtype) -> None:
    optimizer, _ = optimizer_of(dtype)
    gradients = flat_gradients_of(optimizer, ParallelContext.single())
    micro_batch(optimizer, gradients, 1.0, 2.0)
    gradients.complete()
    gradients.reduce()
    gradients.clear()
    micro_batch(optimizer, gradients, 3.0, None)
    gradients.complete()
    assert gradients.partitions[0][:10].tolist() == [3.0] * 6 + [0.0] * 4


def test_deepspeed_finds_the_fragments_of_its_partition() -> None:
    """Of three ranks, the second owns the end of the first parameter and the beginning of the second."""
    optimizer, _ = optimizer_of(torch.float32)
    context = ParallelContext.single()
    gradients = flat_gradients_of(optimizer, context)
    micro_batch(optimizer, gradients, 1.0, 2.0)
    gradients.complete()
    gradients._context = SimpleNamespace(data_group=None, data_size=3, data_rank=1)  # type: ignore[assignment]
    gradients.reduce()
    found = optimizer.averaged_gradients[0]
    assert [fragment.tolist() for fragment in found] == [[1.0, 1.0], [2.0, 2.0]]
    assert found.flat_partition.tolist() == [1.0, 1.0, 2.0, 2.0]


class Allocations(TorchDispatchMode):
    """Largest number of elements of a tensor that an operator has made."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if isinstance(result, Tensor) and "out" not in kwargs and not function._schema.name.endswith("_"):
            aliases = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
            if result.untyped_storage().data_ptr() not in aliases:
                self.largest = max(self.largest, result.numel())
        return result


def linear() -> ColumnParallelLinear:
    layer = ColumnParallelLinear(64, 96, ParallelContext.single(), bias=True, init=Init.normal(0.02))
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(layer.bias)
    return layer


def test_a_linear_layer_adds_its_gradient_without_another_tensor() -> None:
    """Two micro-batches give the same sum as autograd, and nothing of the weight's size is allocated."""
    plain, sunk = linear(), linear()
    total = torch.full_like(sunk.weight, float("nan"))
    sunk.weight.gradient_sink.bind(total)
    batches = torch.randn(2, 1, 8, 64, generator=torch.Generator().manual_seed(1))
    with Allocations() as allocations:
        for x in batches:
            sunk(x).square().sum().backward()
    for x in batches:
        plain(x).square().sum().backward()
    assert sunk.weight.grad is None
    torch.testing.assert_close(total, plain.weight.grad, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(sunk.bias.grad, plain.bias.grad)
    assert allocations.largest < total.numel()


def test_the_sum_of_bf16_gradients_is_in_fp32() -> None:
    sink = GradientSink()
    sink.bind(torch.empty(1, 1))
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    sink.add_product(one, one)
    sink.add_product(one * 2.0**-9, one)
    assert sink.total.item() == 1 + 2.0**-9
