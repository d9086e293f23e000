"""Everything that is to be known from minutes on a GPU, by one command.

    make bench-gpu                              the GPU-marked tests, then each model in each system, within 8 minutes
    make bench-gpu ARGS="--nanogpt DIR"         with nanoGPT, from a checkout
    make bench-gpu ARGS="--tiny"                the same program at tiny size on the CPU: a trial run

Prints tokens/s, MFU, peak memory and kernels of each system, and the longest kernels of one step of ours. `--json FILE`
saves all figures, and the profile of the device that a planner needs. A system that fails, or for which no time is
left, is a line of the table that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu_cases import CASES, FULL, SYSTEMS, TINY, Case, applies
from benchmarks.gpu_worker import Measurement, Order
from megatron_lite.config.schema import Precision
from megatron_lite.observe.hardware import measure_gemm_peak
from megatron_lite.planning.flops import dense_peak_flops

REPOSITORY = Path(__file__).resolve().parent.parent
TESTS_SECONDS = 150.0  # most that the GPU-marked tests may take of the budget
LEAST_SECONDS = 20.0  # less is not enough to build a model and train some steps
COPIED_BYTES = 1 << 30


def main() -> None:
    arguments = _arguments()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    deadline = time.monotonic() + arguments.budget_seconds
    if not arguments.tiny and not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU; use --tiny for a trial run on the CPU, or start this where there is one")
    device = "cpu" if arguments.tiny else "cuda"
    results: dict[str, Any] = {"device": profile_of_device(device), "torch": torch.__version__, "cases": {}}
    console.print(_device_line(results["device"]))
    if not arguments.skip_tests:
        results["tests"] = _run_tests(console, min(TESTS_SECONDS, deadline - time.monotonic()))
    cases = [case for case in (TINY if arguments.tiny else FULL) if not arguments.cases or case.name in arguments.cases]
    rows: dict[str, dict[str, Measurement | str]] = {case.name: {} for case in cases}
    for case, name, found in _measured(cases, device, arguments, deadline, console):
        rows[case.name][name] = found
        if arguments.json:  # after each: the minutes may end early
            results["cases"].setdefault(case.name, {})[name] = found if isinstance(found, str) else asdict(found)
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    for case in cases:
        console.print(_table(case, rows[case.name], results["device"]["bf16_flops"]))
        for name, found in rows[case.name].items():
            if name.startswith("engine") and isinstance(found, Measurement):
                console.print(_kernels(name, found))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each system")
    parser.add_argument("--budget-seconds", type=float, default=480.0, help="after this, nothing more is started")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="some models alone")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--eager-only", action="store_true", help="without torch.compile")
    parser.add_argument("--skip-tests", action="store_true", help="without the GPU-marked tests")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT (the folder of its model.py)")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def profile_of_device(device: str) -> dict[str, Any]:
    """What a plan needs to know of a device: measured FLOP/s of products, bytes/s of copies, memory."""
    name = torch.cuda.get_device_name(0) if device == "cuda" else "CPU, one thread"
    products = {
        f"{precision.value}_gemm_flops": measure_gemm_peak(dtype, device)
        for precision, dtype in ((Precision.bf16, torch.bfloat16), (Precision.fp32, torch.float32))
    }
    listed = dense_peak_flops(name, Precision.bf16) if device == "cuda" else None
    return {
        "name": name,
        "bf16_flops": listed or max(products.values()),
        "bf16_flops_source": "data sheet" if listed else "measured product",
        **products,
        "copy_bytes_per_second": _copy_speed(device),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None,
    }


def _copy_speed(device: str) -> float:
    """Bytes read and written per second by a copy on the device; the best of a few."""
    size = COPIED_BYTES if device == "cuda" else COPIED_BYTES >> 4
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        _synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        best = max(best, 2 * size / (time.perf_counter() - start))
    return best


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _device_line(profile: dict[str, Any]) -> str:
    return (
        f"[bold]{profile['name']}[/bold]: products {profile['bf16_gemm_flops'] / 1e12:,.2f} TFLOP/s in bf16, "
        f"{profile['fp32_gemm_flops'] / 1e12:,.2f} in fp32; copies {profile['copy_bytes_per_second'] / 1e9:,.0f} GB/s; "
        f"MFU against {profile['bf16_flops'] / 1e12:,.2f} TFLOP/s ({profile['bf16_flops_source']})"
    )


def _run_tests(console: Console, seconds: float) -> str:
    """The last line of pytest's output for the tests marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-n", "6", "-m", "gpu", "tests"]  # they share one GPU
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds, check=False)
        lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
        if done.returncode:
            console.print(done.stdout[-6000:], markup=False)
        text = lines[-1]
    except subprocess.TimeoutExpired:
        text = f"stopped after {seconds:.0f} s"
    console.print(f"GPU-marked tests: {text}\n", markup=False)
    return text


def _measured(
    cases: list[Case], device: str, arguments: argparse.Namespace, deadline: float, console: Console
) -> Iterator[tuple[Case, str, Measurement | str]]:
    """Each system on each case, with its figures or the reason for having none: ours first, in case time runs out."""
    ways = [False] if arguments.eager_only else [False, True]
    orders = [(case, system, compiled) for system in arguments.systems for compiled in ways for case in cases]
    for case, system, compiled in orders:
        name = f"{system}, compiled" if compiled else system
        left = deadline - time.monotonic()
        reason = applies(system, case, arguments.nanogpt)
        if reason is None and left < LEAST_SECONDS:
            reason = "no time left"
        if reason is not None:
            yield case, name, reason
            continue
        console.print(f"  {case.name}: {name} ...", markup=False)
        nanogpt = str(arguments.nanogpt) if arguments.nanogpt else None
        yield case, name, _asked(Order(system, case.name, compiled, device, arguments.steps, nanogpt), left)


def _asked(order: Order, seconds: float) -> Measurement | str:
    """The answer of a worker, or why there is none."""
    command = [sys.executable, "-m", "benchmarks.gpu_worker", json.dumps(asdict(order))]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    if order.device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return "stopped: no time left"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return lines[-1][:300]
    return Measurement(**json.loads(done.stdout))


def _table(case: Case, rows: dict[str, Measurement | str], peak_flops: float) -> Table:
    table = Table(
        title=f"{case.name}, bf16, {case.tokens_per_step:,} tokens a step, micro-batch {case.micro_batch_size} x "
        f"{case.seq_length:,}, recomputation: {case.recompute.value}",
        title_justify="left",
        title_style="bold",
    )
    for heading in ("system", "tokens/s", "MFU (6N + 12Lhs)", "MFU (needed)", "peak GiB", "kernels a step", "built s"):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for name, found in rows.items():
        if isinstance(found, str):
            table.add_row(name, found, style="yellow")
            continue
        speed = case.tokens_per_step / statistics.median(found.seconds_per_step)
        table.add_row(
            name,
            f"{speed:,.0f}",
            f"{100 * speed * found.customary_flops_per_token / peak_flops:.1f} %",
            f"{100 * speed * found.needed_flops_per_token / peak_flops:.1f} %",
            f"{found.peak_bytes / 2**30:,.1f}",
            f"{found.kernels_per_step:,}",
            f"{found.build_seconds:,.0f}",
        )
    return table


def _kernels(name: str, found: Measurement) -> Table:
    total = sum(milliseconds for _, milliseconds, _ in found.profile)
    table = Table(title=f"the longest kernels of one step: {name}", title_justify="left")
    for heading in ("kernel", "ms", "calls", "of these"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for name, milliseconds, calls in found.profile:
        table.add_row(name[:90], f"{milliseconds:,.2f}", f"{calls:,}", f"{100 * milliseconds / max(total, 1e-9):.0f} %")
    return table


if __name__ == "__main__":
    main()
