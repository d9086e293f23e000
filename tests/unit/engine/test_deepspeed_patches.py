"""What is done to DeepSpeed's optimizers, on the smallest thing that has their methods."""

from types import SimpleNamespace

import pytest
import torch

from megatron_lite.engine.deepspeed_patches import clip_by_given_norm, skip_reduction_over_one_rank
from megatron_lite.errors import LaunchError
from megatron_lite.parallel.context import ParallelContext


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
        clip_by_given_norm(SimpleNamespace(), lambda: torch.zeros(()), ParallelContext.single())
