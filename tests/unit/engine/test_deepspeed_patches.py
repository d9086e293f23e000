"""What is done to DeepSpeed's optimizers, on the smallest thing that has their methods."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import deepspeed.ops
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.engine.deepspeed_patches import (
    clip_by_given_norm,
    skip_reduction_over_one_rank,
    spare_waits_between_streams,
    waiting_once,
)
from megatron_lite.errors import LaunchError


def test_an_offloading_optimizer_reduces_nothing_over_one_rank() -> None:
    """Unless it does not reduce by that method at all."""
    calls: list[int] = []
    for data_size in (1, 2):
        optimizer = SimpleNamespace(buffered_reduce_fallback=lambda *_, **__: calls.append(1))
        skip_reduction_over_one_rank(optimizer, data_size)
        optimizer.buffered_reduce_fallback(None, [], torch.float32)
        assert len(calls) == data_size - 1
    without = SimpleNamespace()
    skip_reduction_over_one_rank(without, data_size=1)
    assert not vars(without)


def test_an_optimizer_that_takes_no_norm_is_refused() -> None:
    with pytest.raises(LaunchError, match=r"SimpleNamespace has none of scaled_global_norm, .*; pip install -c"):
        clip_by_given_norm(SimpleNamespace(), lambda: torch.zeros(()), 1.0, has_loss_scale=False)


class OneRank:
    """DeepSpeed's ZeRO-1 in bf16 with one weight of one rank, as far as its step is concerned."""

    def __init__(self, optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradient: Tensor) -> None:
        self.optimizer, self.overflow = optimizer, False
        self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition = [weight], [gradient.clone()]
        self.get_grads_for_norm = self._lazy_init_hp_params_optimizer_state = self.update_lp_params = lambda: None
        self.clear_hp_grads = self.clear_lp_grads = lambda: None

    def step(self) -> None:
        raise AssertionError("not replaced")


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize(
    ("norm", "largest_norm"), [(4.0, 1.0), (0.5, 1.0), (4.0, 0.0), (math.inf, 1.0), (math.nan, 0.0)]
)
def test_one_clipped_or_skipped_update(name: str, norm: float, largest_norm: float) -> None:
    """With the decision on the device (AdamW) and on the host; a skipped update leaves the state as it was."""
    gradient = torch.tensor([3.0, -4.0])

    def updated(clip: Callable[[Any, nn.Parameter], None]) -> tuple[list[float], dict[str, Any]]:
        weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        fused: dict[str, Any] = (
            {"fused": True, "eps": 1.0} if name == "AdamW" else {}
        )  # this eps: updates depend on size
        inner = getattr(torch.optim, name)([weight], lr=0.5, weight_decay=0.25, **fused)
        clip(inner, weight)
        return weight.tolist(), inner.state[weight]

    def ours(inner: Any, weight: nn.Parameter) -> None:
        deepspeed = OneRank(inner, weight, gradient)
        clip_by_given_norm(deepspeed, lambda: torch.tensor(norm), largest_norm, has_loss_scale=False)
        deepspeed.step()

    def plain(inner: Any, weight: nn.Parameter) -> None:
        if math.isfinite(norm):
            weight.grad = gradient * (min(1.0, largest_norm / norm) if largest_norm else 1.0)
            inner.step()

    (found, state), (expected, of_plain) = updated(ours), updated(plain)
    assert found == pytest.approx(expected, rel=1e-6)
    assert float(state.get("step", 0)) == float(of_plain.get("step", 0))


def test_the_norm_of_fused_adamw_stays_on_the_device() -> None:
    """No part of the update may look at its value: it would wait for the device."""
    weight = nn.Parameter(torch.zeros(2))
    deepspeed = OneRank(torch.optim.AdamW([weight], fused=True), weight, torch.ones(2))
    clip_by_given_norm(deepspeed, lambda: torch.tensor(4.0), 1.0, has_loss_scale=False)
    with CountReads() as reads:
        deepspeed.step()
    assert reads.count == 1  # of the zero on the CPU that stands for the norm


class CountReads(TorchDispatchMode):
    """Counts how often the value of a tensor is read by Python."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_nothing_is_probed_or_compiled() -> None:
    known = deepspeed.ops.__compatible_ops__
    assert {"cpu_adam", "deepspeed_shm_comm"} <= known.keys()
    assert not any(known.values())


@pytest.mark.parametrize(("offload", "waits"), [(False, 0), (True, 1)])
def test_waits_for_the_reduction_of_zero3(offload: bool, waits: int) -> None:
    """Once for all parameters, and only if the host reads the gradients."""
    waited: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: waited.append("host"))
    optimizer = SimpleNamespace(reduce_and_partition_stream=stream, offload_optimizer=offload)
    spare_waits_between_streams(optimizer)
    with waiting_once(optimizer):
        for _ in range(3):
            stream.synchronize()
    assert len(waited) == waits
