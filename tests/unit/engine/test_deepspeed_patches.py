"""What is done to DeepSpeed's optimizers, on the smallest thing that has their methods."""

import math
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import Any

import deepspeed.ops
import pytest
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lite.engine.deepspeed_patches import (
    clip_by_given_norm,
    spare_copies,
    spare_waits_between_streams,
    waiting_once,
)
from megatron_lite.errors import LaunchError

SIZES = (3, 4)


def bf16_optimizer() -> Any:
    """Two weights whose fp32 gradients lie in one flat tensor, as DeepSpeed keeps them."""
    flat = torch.zeros(sum(SIZES))
    fake = SimpleNamespace(
        bf16_groups=[[nn.Parameter(torch.zeros(size, dtype=torch.bfloat16)) for size in SIZES]],
        fp32_groups_gradients_flat=[flat],
        fp32_groups_gradients=[list(flat.split(SIZES))],
        fp32_groups_has_gradients=[[False] * len(SIZES)],
        non_expert_gradients=[flat],
        has_moe_layers=False,
        autoep_folding_tp_group=None,
    )
    for name in ("_update_hp_grad", "get_grads_for_reduction", "clear_hp_grads"):
        setattr(fake, name, MethodType(getattr(BF16_Optimizer, name), fake))
    return fake


def accumulate(optimizer: Any, *gradients: float | None) -> None:
    """One micro-batch; None = it does not reach that weight."""
    for place, (weight, value) in enumerate(zip(optimizer.bf16_groups[0], gradients, strict=True)):
        weight.grad = None if value is None else torch.full_like(weight, value)
        optimizer._update_hp_grad(weight, 0, place, False)


@pytest.fixture(params=["mended", "as_it_is"])
def optimizer(request: pytest.FixtureRequest) -> Any:
    made = bf16_optimizer()
    if request.param == "mended":
        spare_copies(made, data_size=2)
    return made


def reduced(optimizer: Any) -> Tensor:
    (flat,), _ = optimizer.get_grads_for_reduction()
    return flat.clone()


def test_bf16_gradients_of_a_step_are_the_sum_of_its_micro_batches(optimizer: Any) -> None:
    for _ in range(2):  # the second step begins with what the first has left
        accumulate(optimizer, 1.0, 2.0)
        accumulate(optimizer, 2.0**-9, 0.5)  # lost in bf16
        assert reduced(optimizer).tolist() == [1 + 2.0**-9] * 3 + [2.5] * 4
        optimizer.clear_hp_grads()


def test_a_weight_that_a_step_does_not_reach_has_no_gradient(optimizer: Any) -> None:
    accumulate(optimizer, 1.0, 2.0)
    optimizer.clear_hp_grads()
    accumulate(optimizer, 3.0, None)
    assert reduced(optimizer).tolist() == [3.0] * 3 + [0.0] * 4


def test_one_rank_sums_nothing() -> None:
    alone = bf16_optimizer()
    spare_copies(alone, data_size=1)
    accumulate(alone, 1.0, 2.0)
    alone.clear_hp_grads()
    accumulate(alone, 3.0, None)
    assert alone.get_grads_for_reduction() == ([], {})
    assert alone.fp32_groups_gradients_flat[0].tolist() == [3.0] * 3 + [0.0] * 4


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
