"""Measure one system on one case: `python -m benchmarks.gpu_worker JSON` prints one JSON object.

A process of its own for each measurement, so that each begins with an empty device.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 3
SHOWN_KERNELS = 12


@dataclass(frozen=True)
class Order:
    """What to measure."""

    system: str
    case: str
    compiled: bool
    device: str
    steps: int
    nanogpt: str | None = None


@dataclass(frozen=True)
class Measurement:
    """One system on one case. Sizes in bytes; on a CPU `kernels` counts operators and memory is that of the process."""

    seconds_per_step: list[float]
    loss: float
    parameters: int
    needed_flops_per_token: float
    customary_flops_per_token: float
    peak_bytes: int
    reserved_bytes: int
    kernels_per_step: int
    build_seconds: float
    profile: list[tuple[str, float, int]]
    """Name, milliseconds and calls of each of the longest kernels of one step."""


def main(text: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print to stdout; the answer must stay alone there
    answers.write(json.dumps(asdict(measure(Order(**json.loads(text))))) + "\n")


def measure(order: Order) -> Measurement:
    import torch

    from benchmarks.gpu_cases import CASES, SYSTEMS, Model

    started = time.perf_counter()
    device = torch.device(order.device, 0) if order.device == "cuda" else torch.device("cpu")
    case = CASES[order.case]
    step, parameters = SYSTEMS[order.system](
        case, device, order.compiled, Path(order.nanogpt) if order.nanogpt else None
    )
    for _ in range(WARM_UP_STEPS):
        loss = step()
    build_seconds = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [_timed(step, device) for _ in range(order.steps)]
    peak, reserved = _memory(device)
    kernels, profile = _profiled(step, device)
    model = Model.of(case, parameters)
    return Measurement(
        seconds_per_step=seconds,
        loss=loss,
        parameters=parameters,
        needed_flops_per_token=model.needed,
        customary_flops_per_token=model.customary,
        peak_bytes=peak,
        reserved_bytes=reserved,
        kernels_per_step=kernels,
        build_seconds=build_seconds,
        profile=profile,
    )


def _timed(step: Any, device: Any) -> float:
    """Wall seconds of one step; on a GPU until the device has finished it."""
    import torch

    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _memory(device: Any) -> tuple[int, int]:
    """Peak bytes of tensors, and of what the allocator holds for them."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return resident, resident


def _profiled(step: Any, device: Any) -> tuple[int, list[tuple[str, float, int]]]:
    """Number of kernels of one step, and the longest of them with their sums."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        step()
    milliseconds: defaultdict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for event in profiler.events() or ():
        if (event.device_type == DeviceType.CUDA) is not on_gpu or (not on_gpu and not event.name.startswith("aten::")):
            continue
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        milliseconds[event.name] += own / 1e3
        calls[event.name] += 1
    names = sorted(milliseconds, key=milliseconds.__getitem__, reverse=True)[:SHOWN_KERNELS]
    longest = [(name, milliseconds[name], calls[name]) for name in names]
    return sum(calls.values()), longest


if __name__ == "__main__":
    main(sys.argv[1])
