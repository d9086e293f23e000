"""All patches to DeepSpeed, and all of its private methods that the train step calls.

Observed in DeepSpeed 0.19.8; no upstream issue was found for any of them. What DeepSpeed does without each patch, and
the test or benchmark that then shows it:

`_import_muon_without_compiler`  each rank imports torch's compiler: 6 CPU-seconds. benchmarks/start.py
`_without_shared_memory_comm`    startup compiles an all-reduce that only inference uses. benchmarks/start.py
`DeferredScale`                  fp16's loss scale changes before the gradients are divided by it, so the gradients of a
                                 step in which it doubles are halved. tests/distributed/test_precision.py
`skip_reduction_over_one_rank`   an offloading ZeRO-1 copies all gradients twice for nothing.
                                 tests/unit/engine/test_deepspeed_patches.py
`FlatGradients`                  in `flat_gradients.py`: ZeRO-1 flattens all gradients twice, and all-reduces where each
                                 rank needs its partition only. tests/unit/engine/test_flat_gradients.py
`clip_by_given_norm`             all gradients are read again, in fp64, for a norm that is already known.
                                 tests/unit/engine/test_deepspeed_patches.py, tests/distributed/test_updates.py

If a method that is called or replaced is missing or has other parameters, the run stops with an error that names it
(`require_right_deepspeed`). A DeepSpeed that steps its optimizer to allocate state is refused as well
(`require_no_step_taken`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import deepspeed.ops
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from megatron_lite.errors import LaunchError, TrainingError
from megatron_lite.parallel.context import ParallelContext

DEEPSPEED_FLOOR = (0, 19, 8)
_BUFFER = ("buffer_id",)
USED: dict[type, dict[str, tuple[str, ...]]] = {
    PipelineEngine: {
        "_exec_load_micro_batch": _BUFFER,
        "_exec_recv_activations": _BUFFER,
        "_exec_forward_pass": _BUFFER,
        "_exec_send_activations": _BUFFER,
        "_exec_recv_grads": _BUFFER,
        "_exec_backward_pass": _BUFFER,
        "_exec_send_grads": _BUFFER,
        "_exec_reduce_tied_grads": (),
        "_exec_reduce_grads": (),
        "_exec_optimizer_step": ("lr_kwargs",),
        "_reserve_pipe_buffers": ("num_buffers",),
        "set_dataiterator": ("iterator",),
        "set_train_batch_size": ("train_batch_size",),
    },
    DeepSpeedZeroOptimizer: {
        "_update_scale": ("has_overflow",),
        "buffered_reduce_fallback": ("rank", "grads", "communication_data_type", "elements_per_buffer", "log"),
        "scaled_global_norm": ("norm_type",),
        "check_overflow": ("partition_gradients",),
    },
    DeepSpeedZeroOptimizer_Stage3: {
        "_update_scale": ("has_overflow",),
        "check_overflow": ("partition_gradients",),
    },
    BF16_Optimizer: {
        "_update_hp_grad": ("lp", "group_idx", "param_idx", "clear_lp_grads"),
        "clear_hp_grads": (),
        "get_grads_for_norm": ("for_clipping",),
    },
}
"""Methods of DeepSpeed that are called or replaced, with their parameters. They are not public API and may change in
any release; the check at startup makes that an error instead of a silently wrong gradient."""


def _import_muon_without_compiler() -> None:
    """Import DeepSpeed's Muon optimizer with torch.compile replaced by a decorator that does nothing.

    Its functions are decorated with torch.compile, whose first use imports the whole compiler. Muon is not offered
    here, so nothing needs the compiled functions; the launcher may import this once before it forks the ranks.
    """
    with mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda inner: inner)):
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401


def _without_shared_memory_comm() -> None:
    """Disable the compiled shared-memory all-reduce: only inference uses it, and building it delays startup."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


_import_muon_without_compiler()
_without_shared_memory_comm()


def require_right_deepspeed(version: str) -> None:
    """
    Raises:
        LaunchError: this DeepSpeed computes wrong gradients in a pipeline (before 0.19.3, its issues 7773 and 8152), or
            applies updates with a non-finite gradient except in fp16 (before 0.19.8, which checks the norm).
    """
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < DEEPSPEED_FLOOR:
        floor = ".".join(map(str, DEEPSPEED_FLOOR))
        raise LaunchError(
            f"deepspeed=={version} cannot drop an update whose gradient is not finite, and before 0.19.3 its gradients "
            f"in a pipeline are wrong; pip install 'deepspeed>={floor}'"
        )
    changed = [
        f"{owner.__name__}.{name}({', '.join(expected)})"
        for owner, methods in USED.items()
        for name, expected in methods.items()
        if _parameters(getattr(owner, name, None)) != expected
    ]
    if changed:
        raise LaunchError(
            f"deepspeed=={version} no longer has {'; '.join(changed)}, on which the train step relies; "
            "pip install -c constraints.txt deepspeed"
        )


def _parameters(method: Callable[..., Any] | None) -> tuple[str, ...]:
    """Names of the parameters, without `self`."""
    return ("(gone)",) if method is None else tuple(inspect.signature(method).parameters)[1:]


class DeferredScale:
    """Defers ZeRO's update of the fp16 loss scale until the step is finished.

    DeepSpeed 0.19.8 updates the scale before it divides the gradients by it: in a step in which the scale doubles,
    unclipped gradients would be halved.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._asked: list[bool] = []
        self._original = optimizer._update_scale
        optimizer._update_scale = lambda has_overflow=False: self._asked.append(has_overflow)

    def make(self, dropped: bool) -> None:
        """Apply the update of the scale that the last step requested.

        Args:
            dropped: a hook dropped the step. Its NaN norm looks like an overflow to DeepSpeed but must not lower the
                scale.
        Raises:
            TrainingError: the scale would have to fall below its minimum.
        """
        asked, self._asked = self._asked, []
        for has_overflow in [] if dropped else asked:
            try:
                self._original(has_overflow)
            except Exception as error:  # DeepSpeed raises nothing more specific
                raise TrainingError(
                    f"the gradients overflow fp16 even at a loss scale of train.loss_scale.minimum="
                    f"{self._optimizer.loss_scale:g} ({error}); use train.precision=bf16 or a lower "
                    "optimizer.learning_rate"
                ) from error


def require_no_step_taken(optimizer: Any) -> None:
    """
    Raises:
        LaunchError: DeepSpeed has stepped the optimizer to allocate its state, which puts Adam's bias correction off by
            one step.
    """
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    if any(float(state["step"]) for state in states if "step" in state):
        raise LaunchError(
            "this deepspeed steps the optimizer ahead of the first step, so Adam's bias correction is off by one; "
            "pip install -c constraints.txt deepspeed"
        )


def skip_reduction_over_one_rank(optimizer: Any, data_size: int) -> None:
    """With one data-parallel rank, an offloading ZeRO-1 would flatten all gradients, all-reduce them over that one
    rank, divide them by one and copy them back."""
    if data_size == 1 and hasattr(optimizer, "buffered_reduce_fallback"):
        optimizer.buffered_reduce_fallback = lambda *_, **__: None


def clip_by_given_norm(optimizer: Any, norm: Callable[[], Tensor], context: ParallelContext) -> None:
    """Make DeepSpeed's optimizer clip by this norm, and skip the update if the norm is not finite.

    DeepSpeed's own computation copies every gradient to fp64 (4 % of a one-rank step on a CPU), makes a separate pass
    to look for non-finite elements, and all-reduces over two groups of ranks after each of the two.

    Args:
        norm: returns the norm of the whole model's gradient, times fp16's loss scale: an fp32 scalar, equal on every
            rank.
    Raises:
        LaunchError: this DeepSpeed optimizer has none of the methods through which a norm can be passed.
    """
    if isinstance(optimizer, torch.optim.Optimizer):  # torch's own under ZeRO-0: it does not clip
        return
    counts_here = context.tensor_rank == 0 and context.pipeline_rank == 0
    device = getattr(optimizer, "device", context.device)  # where the gradients are: the CPU if they are offloaded
    to_clip: Any = getattr(optimizer, "get_grads_for_norm", None)

    def leave_it_to_the_norm(*_: Any, **__: Any) -> None:
        optimizer.overflow = False

    def to_sum(for_clipping: bool = False) -> Any:
        """BF16_Optimizer adds up the squares of all ranks of a replica: one rank returns the norm, the others zero."""
        if for_clipping:
            return to_clip(for_clipping=True)
        return [norm() if counts_here else torch.zeros_like(norm())], {}

    given: dict[str, Callable[..., Any]] = {
        "scaled_global_norm": lambda **_: norm().to(device),  # ZeRO-1 and 2
        "_get_norm_groups": lambda: [norm().to(device)],  # ZeRO-3
        "get_grads_for_norm": to_sum,  # ZeRO-1 in bf16
    }
    places = [name for name in given if hasattr(optimizer, name)]
    if not places:
        raise LaunchError(
            f"this deepspeed's {type(optimizer).__name__} has none of {', '.join(given)}; "
            "pip install -c constraints.txt deepspeed"
        )
    for name in places:
        setattr(optimizer, name, given[name])
    optimizer.check_overflow = leave_it_to_the_norm
