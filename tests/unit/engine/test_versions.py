"""Guards of the engine that need no ranks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from megatron_lite.engine.deepspeed_patches import USED, require_no_step_taken, require_right_deepspeed
from megatron_lite.errors import LaunchError


@pytest.mark.parametrize("version", ["0.19.8", "0.19.8+cpu", "0.20.0", "1.0"])
def test_deepspeed_from_the_floor_on(version: str) -> None:
    require_right_deepspeed(version)


@pytest.mark.parametrize("version", ["0.18.5", "0.19.2", "0.19.7.post1"])
def test_older_deepspeed_is_refused_with_the_reason(version: str) -> None:
    with pytest.raises(LaunchError, match=r"not finite, .* in a pipeline are wrong; .*>=0\.19\.8"):
        require_right_deepspeed(version)


def test_a_method_that_is_gone_or_takes_other_arguments_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them, so that none is listed in vain."""
    for owner, methods in USED.items():
        for name in methods:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, lambda self, something_else: None)
                with pytest.raises(LaunchError, match=rf"no longer has {owner.__name__}\.{name}\("):
                    require_right_deepspeed("0.19.8")
    monkeypatch.delattr(PipelineEngine, "_exec_recv_grads")
    with pytest.raises(LaunchError, match=r"no longer has PipelineEngine\._exec_recv_grads"):
        require_right_deepspeed("0.19.8")


def test_an_optimizer_that_has_been_stepped_is_refused() -> None:
    def optimizer(step: int) -> SimpleNamespace:
        return SimpleNamespace(optimizer=SimpleNamespace(state={"w": {"step": torch.tensor(step)}, "v": {}}))

    require_no_step_taken(optimizer(0))
    with pytest.raises(LaunchError, match="off by one"):
        require_no_step_taken(optimizer(1))
