"""All patches to DeepSpeed, and all of its private methods that the train step calls.

Observed in DeepSpeed 0.19.8; no upstream issue was found for any of them. What DeepSpeed does without each patch, and
the test or benchmark that then shows it:

`_import_muon_without_compiler`  each rank imports torch's compiler: 6 CPU-seconds. benchmarks/start.py
`_without_compiled_ops`          startup probes all compiled operations, with seven warnings on each rank with a GPU,
                                 and compiles an all-reduce that only inference uses.
                                 tests/unit/engine/test_deepspeed_patches.py, benchmarks/start.py
`DeferredScale`                  fp16's loss scale changes before the gradients are divided by it, so the gradients of a
                                 step in which it doubles are halved. tests/distributed/test_precision.py
`skip_reduction_over_one_rank`   an offloading ZeRO-1 copies all gradients twice for nothing.
                                 tests/unit/engine/test_deepspeed_patches.py
`FlatGradients`                  in `flat_gradients.py`: ZeRO-1 flattens all gradients twice, and all-reduces where each
                                 rank needs its partition only. tests/unit/engine/test_flat_gradients.py
`spare_waits_between_streams`    on a GPU the host waits at the end of each backward pass of ZeRO-3, and once for each
                                 parameter to measure its gradient. tests/unit/engine/test_deepspeed_patches.py
`clip_by_given_norm`             all gradients are read again, in fp64, for a norm that is already known, and the host
                                 waits for a GPU three or four times.
                                 tests/unit/engine/test_deepspeed_patches.py, tests/distributed/test_updates.py

If a method that is called or replaced is missing or has other parameters, the run stops with an error that names it
(`require_right_deepspeed`). A DeepSpeed that steps its optimizer to allocate state is refused as well
(`require_no_step_taken`).
"""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import deepspeed.ops
import torch
from deepspeed.ops.op_builder.all_ops import ALL_OPS
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from megatron_lite.errors import LaunchError, TrainingError

DEEPSPEED_FLOOR = (0, 19, 8)
CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_
_BUFFER = ("buffer_id",)
_DECORATED = ("kwargs",)  # a decorator hides its parameters: only its existence is checked
USED: dict[Any, dict[str, tuple[str, ...]]] = {
    deepspeed.ops: {"_probe_compatible_ops": ()},
    PipelineEngine: {
        "_exec_load_micro_batch": _BUFFER,
        "_exec_recv_activations": _BUFFER,
        "_exec_forward_pass": _BUFFER,
        "_exec_send_activations": _BUFFER,
        "_exec_recv_grads": _BUFFER,
        "_exec_backward_pass": _BUFFER,
        "_exec_send_grads": _BUFFER,
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
        "update_offload_overflow_tracker": ("grad",),
        "unscale_and_clip_grads": ("grad_groups_flat", "total_norm"),
        "step": ("closure",),
    },
    DeepSpeedZeroOptimizer_Stage3: {
        "_update_scale": ("has_overflow",),
        "_get_norm_groups": _DECORATED,
        "_get_fp32_grad_state_partition": ("param", "release_swap_buffers"),
        "check_overflow": ("partition_gradients",),
        "unscale_and_clip_grads": _DECORATED,
        "step": _DECORATED,
    },
    BF16_Optimizer: {
        "_update_hp_grad": ("lp", "group_idx", "param_idx", "clear_lp_grads"),
        "clear_hp_grads": (),
        "get_grads_for_norm": ("for_clipping",),
        "step": ("closure",),
        "clear_lp_grads": ("set_to_none",),
        "update_lp_params": (),
        "_lazy_init_hp_params_optimizer_state": (),
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


def _without_compiled_ops() -> None:
    """Declare all of DeepSpeed's compiled operations unavailable, before it probes for them.

    Nothing here uses one. The probe starts compilers and, on a GPU, prints a warning for each operation that it cannot
    build; with the answer "available" startup would compile an all-reduce through shared memory for inference.
    """
    deepspeed.ops.__compatible_ops__ = dict.fromkeys([*ALL_OPS, "deepspeed_not_implemented"], False)


_import_muon_without_compiler()
_without_compiled_ops()


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
    if method is None:
        return ("(gone)",)
    parameters = tuple(inspect.signature(method).parameters)
    return parameters[1:] if parameters[:1] in (("self",), ("args",)) else parameters


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


def spare_waits_between_streams(optimizer: Any) -> None:
    """Let the host go on while ZeRO-3 reduces gradients.

    Without overlap (`zero_optimization.overlap_comm`) it does so on the stream that computes, in order, so there is
    nothing to wait for, unless the host itself reads the gradients.
    """
    stream = getattr(optimizer, "reduce_and_partition_stream", None)
    if stream is not None and not optimizer.offload_optimizer:
        stream.synchronize = _no_wait


@contextlib.contextmanager
def waiting_once(optimizer: Any) -> Iterator[None]:
    """Wait for ZeRO-3's reduction here, instead of again for each parameter that is read within."""
    stream = getattr(optimizer, "reduce_and_partition_stream", None)
    if stream is None:
        yield
        return
    stream.synchronize()
    with mock.patch.object(stream, "synchronize", _no_wait):
        yield


def _no_wait() -> None:
    """In place of a stream's `synchronize`."""


def clip_by_given_norm(
    optimizer: Any, norm: Callable[[], Tensor], largest_norm: float, *, has_loss_scale: bool
) -> None:
    """Make DeepSpeed's optimizer clip by this norm, and skip the update if the norm is not finite.

    DeepSpeed's own computation copies every gradient to fp64 (4 % of a one-rank step on a CPU), makes a separate pass
    to look for non-finite elements, all-reduces over two groups of ranks after each of the two, and waits for the
    device three or four times. Here torch's fused AdamW looks at the norm on the device and clips in the pass that
    updates the weights, so nothing waits. For other optimizers and in fp16 the host reads the norm, once.

    Args:
        norm: returns the norm of the whole model's gradient, times fp16's loss scale: an fp32 scalar, equal on every
            rank.
        largest_norm: 0 = no clipping.
        has_loss_scale: the host has to know about an overflow, to change the loss scale.
    Raises:
        LaunchError: this DeepSpeed optimizer has none of the methods through which a norm can be passed.
    """
    if isinstance(optimizer, torch.optim.Optimizer):  # torch's own under ZeRO-0: it does not clip
        return
    fused = _is_fused_adamw(getattr(optimizer, "optimizer", None)) and not has_loss_scale
    _leave_overflows_to_the_norm(optimizer)
    to_judge = (lambda: torch.zeros(())) if fused else (lambda: norm().cpu())
    ways: dict[str, Callable[..., Any]] = {
        "scaled_global_norm": lambda **_: to_judge(),  # ZeRO-1 and 2
        "_get_norm_groups": lambda: [to_judge()],  # ZeRO-3
        "get_grads_for_norm": lambda **_: None,  # ZeRO-1 in bf16, whose whole step is replaced
    }
    way = next((name for name in ways if hasattr(optimizer, name)), None)
    if way is None:
        raise LaunchError(
            f"this deepspeed's {type(optimizer).__name__} has none of {', '.join(ways)}; "
            "pip install -c constraints.txt deepspeed"
        )
    setattr(optimizer, way, ways[way])
    if way == "get_grads_for_norm":
        optimizer.step = partial(_step_in_bf16, optimizer, to_judge, 0.0 if fused else largest_norm)
    if fused:
        optimizer.unscale_and_clip_grads = lambda *_: None
        optimizer.step = partial(_step_after, optimizer.step, lambda: _pass_norm(optimizer, norm(), largest_norm))


def _is_fused_adamw(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.AdamW) and bool(optimizer.defaults["fused"])


def _leave_overflows_to_the_norm(optimizer: Any) -> None:
    """Without this DeepSpeed looks for non-finite elements itself; ZeRO-2 with offload waits once per parameter."""

    def none_found(*_: Any, **__: Any) -> None:
        optimizer.overflow = False

    optimizer.check_overflow = none_found
    optimizer.update_offload_overflow_tracker = lambda grad: None


def _pass_norm(optimizer: Any, norm: Tensor, largest_norm: float) -> None:
    """Let torch's fused optimizer divide gradients by `grad_scale`, and skip the update if `found_inf` is 1: these are
    what torch's GradScaler sets."""
    fused = optimizer.optimizer
    norm = norm.to(getattr(optimizer, "device", norm.device))  # the CPU if the optimizer is offloaded
    fused.found_inf = norm.isfinite().logical_not().float()
    if largest_norm:
        fused.grad_scale = ((norm + CLIP_EPSILON) / largest_norm).clamp(min=1.0)


def _step_after(step: Callable[[], None], prepare: Callable[[], None], closure: None = None) -> None:
    prepare()
    step()


@torch.no_grad()
def _step_in_bf16(optimizer: Any, to_judge: Callable[[], Tensor], largest_norm: float, closure: None = None) -> None:
    """`BF16_Optimizer.step` with the norm of the gradient given on the CPU."""
    norm = to_judge()
    optimizer.overflow = not math.isfinite(norm)
    if optimizer.overflow:
        optimizer.clear_hp_grads()
        optimizer.clear_lp_grads()
        return
    gradients = optimizer.fp32_groups_gradient_flat_partition
    if largest_norm and norm > largest_norm:
        torch._foreach_mul_(gradients, largest_norm / (float(norm) + CLIP_EPSILON))
    for partition, gradient in zip(optimizer.fp32_groups_flat_partition, gradients, strict=True):
        partition.grad = gradient
    optimizer.optimizer.step()
    optimizer._lazy_init_hp_params_optimizer_state()
    optimizer.update_lp_params()
    optimizer.clear_hp_grads()
