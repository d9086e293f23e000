"""Probes of the machine, timers, and the arithmetic of speed. Nothing here asserts a duration."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_lite.observe import hardware
from megatron_lite.observe.hardware import (
    enable_fast_float32_matmul,
    measure_gemm_peak,
    one_thread,
    usable_cores,
)
from megatron_lite.observe.throughput import Throughput


@pytest.fixture(autouse=True)
def _restore_precision():  # type: ignore[no-untyped-def]
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_usable_cores_respects_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 7}, raising=False)
    monkeypatch.setattr(hardware, "_cgroup_quota", lambda root: None)
    assert usable_cores() == 3
    monkeypatch.setattr(hardware, "_cgroup_quota", lambda root: 2.5)
    assert usable_cores() == 2
    monkeypatch.setattr(hardware, "_cgroup_quota", lambda root: 0.5)
    assert usable_cores() == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "garbage\n"}, None),
        ({}, None),
    ],
)
def test_cgroup_quota(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert hardware._cgroup_quota(tmp_path) == expected


def test_fast_float32_is_kept_only_when_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    decision = enable_fast_float32_matmul()
    assert torch.get_float32_matmul_precision() == decision.precision
    assert hardware._matmul_error() < 2e-6
    assert (decision.precision == "medium") == (decision.relative_error < 2e-6)

    # A machine that rounds to bf16 under `medium`, as AMX may.
    monkeypatch.setattr(
        hardware, "_matmul_error", lambda: 2e-3 if torch.get_float32_matmul_precision() == "medium" else 3e-7
    )
    decision = enable_fast_float32_matmul()
    assert (decision.precision, decision.relative_error, decision.highest_error) == ("highest", 2e-3, 3e-7)
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_error_probe_sees_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit lies far from what rounding to bf16 would give: the probe cannot mistake one for the other."""
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda a, b, bias: linear(a.bfloat16(), b.bfloat16(), bias.bfloat16()).float()
    )
    assert hardware._matmul_error() > 1e-3


def test_cuda_precision_is_left_alone() -> None:
    torch.set_float32_matmul_precision("high")
    assert enable_fast_float32_matmul("cuda").precision == "high"
    assert torch.get_float32_matmul_precision() == "high"


def test_gemm_peak_is_plausible_and_restores_threads() -> None:
    threads = torch.get_num_threads()
    assert 1e9 < measure_gemm_peak(torch.float32) < 1e13
    assert torch.get_num_threads() == threads


FAULTS = """
import resource, sys, torch
from megatron_lite.observe.hardware import reuse_freed_memory
if sys.argv[1] == "reuse":
    assert reuse_freed_memory()
def step():
    return [torch.ones(12_000_000) for _ in range(3)]  # 48 MB each: 35,000 pages of 4 KB
for _ in range(12):  # the heap finds its size within about five
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    environment = {**os.environ, "GLIBC_TUNABLES": "", "THP_MEM_ALLOC_ENABLE": "0"}

    def faults(word: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, word], capture_output=True, text=True, check=True, env=environment
        )
        return int(done.stdout)

    assert faults("reuse") < 1000 < faults("plain") / 10


def test_threads_come_back_after_an_error() -> None:
    threads = torch.get_num_threads()

    def fail() -> None:
        with one_thread():
            assert torch.get_num_threads() == 1
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert torch.get_num_threads() == threads


def test_throughput() -> None:
    speed = Throughput.of(tokens=1000, seconds=2.0, flops_per_token=6e6, peak_flops=1e10)
    assert speed == Throughput(500.0, 0.3)
    assert Throughput.of(1000, 2.0, 6e6, None).model_flops_utilization is None
