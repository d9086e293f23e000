"""Properties of this machine: cores, matmul speed, and the fastest float32 matmul that is still true float32."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

# mallopt's parameters, from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4

_GEMM_SIZE = 768  # rows and columns: large enough for full speed, 0.9 GFLOP each
_PROBE_SECONDS = 0.12
_TRUE_FLOAT32_ERROR = 2e-6  # see enable_fast_float32_matmul


@dataclass(frozen=True)
class Float32Matmul:
    """What `enable_fast_float32_matmul` decided.

    `relative_error` is that of a product under `medium` against float64 (None if it was not tried),
    `highest_error` that of torch's default; `reason` is one sentence for the log.
    """

    precision: str
    relative_error: float | None
    highest_error: float | None
    reason: str


def usable_cores() -> int:
    """Cores that this process may use: the smaller of its CPU affinity and its cgroup's quota; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(Path("/sys/fs/cgroup"))
    return max(1, min(cores, math.floor(quota))) if quota is not None else max(1, cores)


def _cgroup_quota(root: Path) -> float | None:
    """Cores' worth of CPU time that the cgroup (version 2, then 1) grants; None = no limit or no cgroup."""
    try:
        if (root / "cpu.max").exists():
            limit, period = (root / "cpu.max").read_text().split()
        else:
            limit = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        return None if limit in ("max", "-1") else float(limit) / float(period)
    except (OSError, ValueError):
        return None


def measure_gemm_peak(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Dense matmul speed in FLOP/s: of one thread on a CPU, of the whole device on CUDA.

    The best of a few products within about 0.2 s. On a CPU the thread's own CPU time counts, so that other processes on
    the same cores do not lower the result. The current float32 matmul precision applies.
    """
    device = torch.device(device)
    size = _GEMM_SIZE if device.type == "cpu" else 8192
    with one_thread() if device.type == "cpu" else contextlib.nullcontext():
        a = torch.ones(size, size, dtype=dtype, device=device)
        b, out = torch.ones_like(a), torch.empty_like(a)
        torch.mm(a, b, out=out)  # chooses the kernel
        best = math.inf
        deadline = time.perf_counter() + _PROBE_SECONDS
        while best == math.inf or time.perf_counter() < deadline:
            best = min(best, _seconds_of_product(a, b, out))
    return 2 * size**3 / best


def _seconds_of_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    if a.device.type == "cpu":
        start = time.thread_time()
        torch.mm(a, b, out=out)
        return time.thread_time() - start
    torch.cuda.synchronize(a.device)
    start = time.perf_counter()
    torch.mm(a, b, out=out)
    torch.cuda.synchronize(a.device)
    return time.perf_counter() - start


def enable_fast_float32_matmul(device: torch.device | str = "cpu") -> Float32Matmul:
    """Use oneDNN for float32 matmuls on a CPU if they stay true float32.

    `torch.set_float32_matmul_precision("medium")` permits bf16 inside float32 matmuls. On a CPU without AMX it only
    replaces MKL by oneDNN, which on AMD is about twice as fast and as exact; with AMX it may really round to bf16
    (2^-9, an error of about 2e-3). So it is tried, and kept only if the error against float64 stays below 2e-6, the
    rounding error of float32 sums of this size. On CUDA nothing changes: TF32 is the user's choice.
    """
    if torch.device(device).type != "cpu":
        return Float32Matmul(torch.get_float32_matmul_precision(), None, None, "TF32 on CUDA is left as it was")
    torch.set_float32_matmul_precision("highest")
    highest = _matmul_error()
    torch.set_float32_matmul_precision("medium")
    medium = _matmul_error()
    if medium < _TRUE_FLOAT32_ERROR:
        return Float32Matmul("medium", medium, highest, "float32 products through oneDNN, in true float32")
    torch.set_float32_matmul_precision("highest")
    return Float32Matmul("highest", medium, highest, "this CPU's oneDNN would round float32 products to bf16")


def _matmul_error() -> float:
    """Relative error (Frobenius) of float32 products against float64, the worst of shapes that training uses."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for rows, inner, columns in ((256, 512, 256), (64, 1024, 512)):
        a = torch.randn(rows, inner, generator=generator)
        b = torch.randn(columns, inner, generator=generator)
        exact = a.double() @ b.double().T
        bias = torch.zeros(columns)
        for product in (a @ b.T, torch.nn.functional.linear(a, b, bias)):
            worst = max(worst, ((product.double() - exact).norm() / exact.norm()).item())
    return worst


def reuse_freed_memory() -> bool:
    """Keep large freed blocks of host memory in this process, so that the next step can reuse them.

    glibc maps each block above a threshold (32 MB at most) anew and returns it to the system when it is freed, so every
    step pays page faults for its logits, flat gradients and activations: 5 % of a CPU step in a plain loop, 8 % under
    ZeRO, which flattens. With these settings blocks come from the heap, which grows for about five steps and is given
    back only above 2 GB of free space at its end. The heap fragments: resident memory grew by 17 % under ZeRO-1.

    Returns:
        whether the C library accepted the settings; False if it is not glibc
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    answers = [mallopt(parameter, value) for parameter, value in settings]
    return all(answer == 1 for answer in answers)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU kernels on the calling thread only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
