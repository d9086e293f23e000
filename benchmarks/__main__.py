"""Run every comparison side by side and print figures, ratios and targets.

    python -m benchmarks                        all parts, about ten minutes on two cores
    python -m benchmarks --parts fp32 loader    some of them
    python -m benchmarks --vocab 50304          another vocabulary
    python -m benchmarks --parts growth --axes sequence cut

CPU-seconds with one thread per rank are the primary figure, because other work on the machine disturbs them least; wall
time is shown beside them. `--json FILE` saves all figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.report import Sample, Target, ratios, show_systems, show_targets
from benchmarks.worker import Worker, worker_environment

PARTS = ("fp32", "bf16", "grid", "start", "loader", "checkpoints", "watching", "growth")
# CPU-seconds of a `transformers` step, and tokens per CPU-second of Megatron-DeepSpeed at DP2 x TP2 x PP2, both
# measured on one machine with this model; together they say what Megatron-DeepSpeed would do on this machine.
REFERENCE_TRANSFORMERS_SECONDS = 1.229
REFERENCE_GRID_TOKENS = 669.0
SYSTEMS = {
    "fp32": ("bare_torch", "engine", "transformers"),
    "bf16": ("bare_torch", "engine", "transformers", "transformers_master"),
}
CHECKPOINT_ROWS = (  # what is measured, ours, DeepSpeed's
    ("save, training waits", "save", "deepspeed_save"),
    ("save in the background: training waits", "stall_async", None),
    ("save in the background: until it is published", "total_async", None),
    ("load under the same layout, hashes checked", "load", "deepspeed_load"),
    ("offline conversion for another layout", None, "deepspeed_conversion"),
    ("load under another layout", "reshard", "deepspeed_reshard"),
)
LABELS = {
    "bare_torch": "bare torch loop, our layers",
    "engine": "our engine, one rank",
    "transformers": "transformers, plain loop",
    "transformers_master": "transformers, bf16 weights + fp32 masters",
}


def main() -> None:
    arguments = _arguments()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    targets: list[Target] = []
    results: dict[str, Any] = {"vocab_size": arguments.vocab}
    for part in ("fp32", "bf16"):
        if part in arguments.parts:
            results[part] = _single(console, part, arguments, targets)
    if "grid" in arguments.parts:
        results["grid"] = _grid(console, arguments, targets)
    if "start" in arguments.parts:
        results["start"] = _start(console, arguments, targets)
    if "loader" in arguments.parts:
        results["loader"] = _loader(console, arguments)
    for part, measure in (("checkpoints", _checkpoints), ("watching", _watching), ("growth", _growth)):
        if part in arguments.parts:
            results[part] = measure(console, arguments, targets)
    if targets:
        show_targets(console, targets)
    results["targets"] = [{**asdict(target), "met": target.met} for target in targets]
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:-1], help="all but growth, unless given")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--turns", type=int, default=5, help="rounds of A B C A B C")
    parser.add_argument("--steps", type=int, default=4, help="steps of one turn")
    parser.add_argument("--axes", nargs="+", default=[], help="of the part growth, such as sequence and ranks")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def _single(console: Console, precision: str, arguments: argparse.Namespace, targets: list[Target]) -> dict[str, Any]:
    """The systems that run on one process with one thread; they take turns."""
    from benchmarks.shape import TOKENS_PER_STEP, Shape
    from megatron_lite.config.schema import Precision

    names = SYSTEMS[precision]
    cpu, wall, peaks = _take_turns(names, precision, arguments)
    flops, peak = Shape(arguments.vocab, Precision(precision)).flops_per_step(), max(peaks.values)
    title = (
        f"{precision}, vocabulary {arguments.vocab:,}, {TOKENS_PER_STEP:,} tokens a step, {flops / 1e9:.1f} GFLOP; "
        f"GEMM peak of one thread {peak / 1e9:,.0f} GFLOP/s"
    )
    show_systems(
        console,
        title,
        [(LABELS[name], cpu[name], wall[name], flops / cpu[name].median / peak) for name in names],
    )
    peers = [name for name in names if name.startswith("transformers")]
    best = min(peers, key=lambda name: cpu[name].median)
    overhead = ratios(cpu["engine"], cpu["bare_torch"])
    speed = ratios(cpu[best], cpu["engine"])
    limit = cpu[best].median * peak / flops
    targets.append(
        Target(
            f"{precision}: engine overhead over the bare loop",
            100 * (overhead.median - 1),
            5,
            at_most=True,
            unit=" %",
            note=f"turns {100 * (min(overhead.values) - 1):.1f} to {100 * (max(overhead.values) - 1):.1f} %",
        )
    )
    targets.append(
        Target(
            f"{precision}: speed against {LABELS[best]}",
            speed.median,
            1.6 if precision == "fp32" else 1.2,
            unit=" x",
            note=f"turns {min(speed.values):.2f} to {max(speed.values):.2f}; {limit:.2f} would be all of the peak",
        )
    )
    return {
        "cpu_seconds": {name: cpu[name].values for name in names},
        "wall_seconds": {name: wall[name].values for name in names},
        "gemm_peak_flops": peaks.values,
        "flops_per_step": flops,
    }


def _take_turns(
    names: tuple[str, ...], precision: str, arguments: argparse.Namespace
) -> tuple[dict[str, Sample], dict[str, Sample], Sample]:
    """CPU-seconds and wall seconds of each system, and the GEMM peak measured between them."""
    cpu: dict[str, list[float]] = {name: [] for name in names}
    wall: dict[str, list[float]] = {name: [] for name in names}
    peaks: list[float] = []
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(name, precision, arguments.vocab)) for name in names]
        for worker in workers:
            worker.wait_until_ready()
        for _ in range(arguments.turns):
            peaks.append(workers[0].gemm_peak())
            for worker in workers:
                cost = worker.run(arguments.steps)
                cpu[worker.name].append(cost.cpu_seconds)
                wall[worker.name].append(cost.wall_seconds)
    return (
        {name: Sample.of(values) for name, values in cpu.items()},
        {name: Sample.of(values) for name, values in wall.items()},
        Sample.of(peaks),
    )


def _grid(console: Console, arguments: argparse.Namespace, targets: list[Target]) -> dict[str, Any]:
    """Eight ranks. transformers runs before and after them, as the speed of this machine in the same minutes."""
    from benchmarks.grid import TOKENS

    with Worker("transformers", "fp32", arguments.vocab) as peer:
        peer.wait_until_ready()
        peers = [peer.run(arguments.steps).cpu_seconds for _ in range(2)]
        command = [sys.executable, "-m", "benchmarks.grid", "fp32", str(arguments.vocab), "3", "2"]
        done = subprocess.run(command, capture_output=True, text=True, env=worker_environment(), check=False)
        if done.returncode:
            raise RuntimeError(f"the 2x2x2 job failed:\n{done.stderr[-3000:]}")
        peers += [peer.run(arguments.steps).cpu_seconds for _ in range(2)]
    costs = json.loads(done.stdout)
    cpu = Sample.of([cost["cpu_seconds"] for cost in costs])
    wall = Sample.of([cost["wall_seconds"] for cost in costs])
    kernel = Sample.of([cost["kernel_seconds"] for cost in costs])
    machine = REFERENCE_TRANSFORMERS_SECONDS / Sample.of(peers).median
    console.print(
        f"\n[bold]DP2 x TP2 x PP2, fp32, {TOKENS:,} tokens a step[/bold]\n"
        f"  CPU-s of all ranks  {cpu.text()}, of them in the kernel {kernel.text()}\n"
        f"  wall s              {wall.text()}\n"
        f"  tokens per CPU-s    {TOKENS / cpu.median:,.0f}\n  tokens per wall s   {TOKENS / wall.median:,.0f}\n"
        f"  this machine runs transformers at {machine:.2f} of the speed of the reference machine\n"
    )
    targets.append(
        Target(
            "2x2x2: tokens per CPU-s",
            TOKENS / cpu.median,
            1.4 * REFERENCE_GRID_TOKENS * machine,
            note=f"1.4 x {REFERENCE_GRID_TOKENS:.0f} of Megatron-DeepSpeed x {machine:.2f}",
        )
    )
    return {
        "cpu_seconds": cpu.values,
        "kernel_seconds": kernel.values,
        "wall_seconds": wall.values,
        "tokens": TOKENS,
        "transformers": peers,
    }


def _loader(console: Console, arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.loader import SEQ_LENGTH, measure

    found = measure(_cache_dir(), arguments.turns)
    console.print(f"\n[bold]Loader, sequence {SEQ_LENGTH}, one core[/bold]: samples and tokens read per CPU-second")
    for loading in found:
        speed = Sample.of(loading.samples_per_second)
        tokens = speed.median * loading.tokens_per_sample
        console.print(f"  {loading.objective:<20}{speed.text(0):>28}   {tokens / 1e6:6.1f} M tokens")
    return {loading.objective: loading.samples_per_second for loading in found}


def _checkpoints(console: Console, arguments: argparse.Namespace, targets: list[Target]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.checkpoints", str(arguments.vocab), str(arguments.turns)]
    done = subprocess.run(command, capture_output=True, text=True, env=worker_environment(), check=False)
    if done.returncode:
        raise RuntimeError(f"the checkpoints' jobs failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout)
    seconds = {name: Sample.of(values) for name, values in found["seconds"].items()}
    millions = found["parameters"] / 1e6
    console.print(
        f"\n[bold]Checkpoints of {millions:.1f} M parameters with Adam's moments, eight ranks[/bold], seconds"
    )
    for label, *names in CHECKPOINT_ROWS:
        own, other = (seconds[name].text(2) if name else "-" for name in names)
        console.print(f"  {label:<42}{own:>24}   DeepSpeed {other:>24}")
    minimum = found["bytes"] / found["minimum_bytes"]
    console.print(
        f"  bytes written / minimum                   {minimum:.4f}   DeepSpeed {found['deepspeed_ratio']:.4f}\n"
    )
    ours = seconds["save"].median + seconds["reshard"].median
    theirs = sum(seconds[f"deepspeed_{name}"].median for name in ("save", "conversion", "reshard"))
    for title, value, limit in (
        ("async stall / synchronous save", ratios(seconds["stall_async"], seconds["save"]).median, 0.1),
        ("resharded load / same-layout load", seconds["reshard"].median / seconds["load"].median, 1.2),
        ("save and load elsewhere / DeepSpeed's", ours / theirs, 0.5),
    ):
        targets.append(Target(f"checkpoints: {title}", value, limit, at_most=True))
    return found


def _watching(console: Console, arguments: argparse.Namespace, targets: list[Target]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.watching", str(arguments.vocab), str(min(arguments.turns, 3))]
    done = subprocess.run(command, capture_output=True, text=True, env=worker_environment(), check=False)
    if done.returncode:
        raise RuntimeError(f"the watched job failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout)
    console.print("\n[bold]Watching a run, DP2 x TP2 x PP2, fp32[/bold]: a step, with wandb offline")
    cpu = {way: Sample.of(costs["cpu_seconds"]) for way, costs in found.items()}
    for way, costs in found.items():
        console.print(f"  {way:<10} CPU-s {cpu[way].text()}   wall s {Sample.of(costs['wall_seconds']).text()}")
    for way in ("warn", "rollback"):
        ratio = ratios(cpu[way], cpu["bare"])
        note = f"turns {100 * (min(ratio.values) - 1):.1f} to {100 * (max(ratio.values) - 1):.1f} %"
        title = f"watching with stability.on_spike={way}, CPU-s above a bare step"
        targets.append(Target(title, 100 * (ratio.median - 1), 2, at_most=True, unit=" %", note=note))
    return found


def _growth(console: Console, arguments: argparse.Namespace, targets: list[Target]) -> list[dict[str, Any]]:
    """Cost per token along each axis; what grows faster than its work is marked and becomes a target that is missed."""
    from benchmarks.growth import FASTER_THAN_WORK, Found

    command = [sys.executable, "-m", "benchmarks.growth", str(min(arguments.turns, 2)), "1", *arguments.axes]
    done = subprocess.run(command, capture_output=True, text=True, env=worker_environment(), check=False)
    if done.returncode:
        raise RuntimeError(f"a job of growing size failed:\n{done.stderr[-3000:]}")
    rows = json.loads(done.stdout)
    first: dict[str, Found] = {}
    for row in rows:
        point = Found(**row)
        if point.axis not in first:
            first[point.axis] = point
            console.print(f"\n[bold]Growth with {point.axis}[/bold]: of one token, in all ranks")
        ratio = point.seconds_per_flop / first[point.axis].seconds_per_flop
        work = point.flops_per_token / first[point.axis].flops_per_token
        if ratio > FASTER_THAN_WORK:
            title = f"growth with {point.axis} to {point.label}: CPU-s per FLOP"
            targets.append(Target(title, ratio, FASTER_THAN_WORK, at_most=True, unit=" x"))
        mark = "  FASTER THAN ITS WORK" if ratio > FASTER_THAN_WORK else ""
        console.print(
            f"  {point.label:<20}{1e6 * min(point.cpu_seconds_per_token):>9,.1f} CPU-us, work x {work:.2f}, CPU-s per "
            f"FLOP x {ratio:.2f}; busiest rank {min(point.slowest_seconds):.3f} CPU-s a step, "
            f"{min(point.largest_share):.2f} x the mean; {max(point.peak_bytes) / 2**20:,.0f} MiB{mark}"
        )
    return rows


def _cache_dir() -> Path:
    """Where prepared corpora are kept."""
    return Path(os.environ.get("BENCH_CACHE_DIR", "data"))


def _start(console: Console, arguments: argparse.Namespace, targets: list[Target]) -> dict[str, Any]:
    from benchmarks.start import seconds_to_first_step

    cache_dir = _cache_dir()
    with tempfile.TemporaryDirectory(prefix="bench-start-") as name:
        seconds_to_first_step(Path(name) / "prepare", cache_dir)
        figures = [seconds_to_first_step(Path(name) / f"run{turn}", cache_dir) for turn in range(3)]
    sample = Sample.of(figures)
    console.print(f"\n[bold]Command to the end of the demo's first step, 8 local ranks[/bold]: {sample.text(1)} s\n")
    targets.append(Target("launch to first step, 8 ranks", sample.median, 8, at_most=True, unit=" s"))
    return {"seconds": sample.values}


if __name__ == "__main__":
    main()
