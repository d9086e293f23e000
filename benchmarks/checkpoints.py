"""Saving and loading a training state, beside DeepSpeed's own checkpoints, on eight ranks of this machine.

`python -m benchmarks.checkpoints VOCAB TURNS` prints one JSON object. The state is written by DP2 x TP2 x PP2 and read,
each by a separate job, under the same layout and under DP2 x TP1 x PP4. DeepSpeed's way to another layout is its
save, the offline conversion to a universal checkpoint, and a load of that.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.ranks import build_rank, run_job
from benchmarks.shape import MICRO_BATCH, SEED, Shape

if TYPE_CHECKING:
    from megatron_lite.engine.engine import Engine

WORLD_SIZE = 8
SAVED, OTHER = (2, 2, 2), (2, 1, 4)  # data, tensor, pipeline
GLOBAL_BATCH = MICRO_BATCH * 4
BYTES_OF_A_PARAMETER = 12  # fp32 weight and two moments: less cannot be written
CONVERSION_WORKERS = 2  # the cores of this machine
# What DeepSpeed's converter must be told of our tensors, by their names in its pipeline.
PATTERNS = {
    "universal_checkpoint_version": 0.2,
    "vocabulary_parameter_patterns": [r"tied_modules\..*\.weight"],
    "tp_replicated_parameter_patterns": [r".*norm\..*", r".*projection\.bias", r".*down\.bias", r"\d+\.(weight|bias)"],
    "parameter_with_row_parallelism_patterns": [r".*projection\.weight", r".*down\.weight"],
}


def main(vocab_size: str, turns: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="bench-checkpoints-") as name:
        folder = Path(name)
        seconds = json.loads(run_job(WORLD_SIZE, _save_rank, folder, int(vocab_size), int(turns)))
        seconds["deepspeed_conversion"] = [_convert(folder, turn) for turn in range(int(turns))]
        for name, layout in (("load", SAVED), ("reshard", OTHER)):
            seconds |= json.loads(run_job(WORLD_SIZE, _load_rank, folder, name, layout, int(vocab_size), int(turns)))
        answers.write(json.dumps({"seconds": seconds, **_sizes(folder)}) + "\n")


def _sizes(folder: Path) -> dict[str, float]:
    """Bytes on the disk, beside the fewest that can hold the state."""
    from megatron_lite.config.hf.headers import tensors_of
    from megatron_lite.files import bytes_below

    checkpoint = next((folder / "ours").glob("step_*"))
    parameters = sum(math.prod(entry.shape) for entry in tensors_of(checkpoint).values())
    minimum = BYTES_OF_A_PARAMETER * parameters
    ours, theirs = (bytes_below(path) for path in (checkpoint, folder / "deepspeed0"))
    return {
        "parameters": parameters,
        "bytes": ours,
        "minimum_bytes": minimum,
        "deepspeed_ratio": theirs / minimum,
    }


def _save_rank(rank: int, folder: Path, checkpoints: Path, vocab_size: int, turns: int) -> None:
    """Every way of saving."""
    from megatron_lite.optim.batch_ramp import BatchStep
    from megatron_lite.parallel.topology import Topology

    engine, shape = _engine(rank, folder, Topology(*SAVED), vocab_size)
    batches = [shape.batch(SEED + index) for index in range(2)]
    engine.train_step(batches, BatchStep(0, GLOBAL_BATCH), 3e-4)
    found: dict[str, list[float]] = {}
    for turn in range(turns):
        ours, theirs = _savers(engine, checkpoints), checkpoints / f"deepspeed{turn}"
        for asynchronous, saver in ours.items():
            _measure(found, "stall_async" if asynchronous else "save", saver.save, *_state(engine))
            saver.wait()
            if asynchronous:
                found.setdefault("total_async", []).append(saver.reports.pop().total_seconds)
        client = {"universal_checkpoint_info": PATTERNS | {"original_vocab_size": vocab_size}}
        save = engine.deepspeed_engine.save_checkpoint
        _measure(found, "deepspeed_save", save, str(theirs), tag="bench", client_state=client)
    _finish(rank, folder, found)


def _load_rank(
    rank: int, folder: Path, checkpoints: Path, name: str, layout: tuple[int, int, int], vocab_size: int, turns: int
) -> None:
    """Load what the layout SAVED has saved, ours and DeepSpeed's, and measure it."""
    from megatron_lite.parallel.topology import Topology

    engine, _ = _engine(rank, folder, Topology(*layout), vocab_size)
    theirs = engine.deepspeed_engine
    found: dict[str, list[float]] = {}
    for turn in range(turns):
        _measure(found, name, _load, engine, checkpoints)
        if layout == SAVED:
            source, tag = checkpoints / f"deepspeed{turn}", "bench"
        else:
            source, tag = checkpoints, f"universal{turn}"
            theirs._config.load_universal_checkpoint = True
        _measure(found, f"deepspeed_{name}", theirs.load_checkpoint, str(source), tag=tag)
    _finish(rank, folder, found)


def _convert(folder: Path, turn: int) -> float:
    """Seconds of DeepSpeed's offline conversion."""
    source, target = folder / f"deepspeed{turn}" / "bench", folder / f"universal{turn}"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    command += ["--num_extract_workers", str(CONVERSION_WORKERS), "--num_merge_workers", str(CONVERSION_WORKERS)]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr)
    return time.perf_counter() - began


def _engine(rank: int, folder: Path, layout: Any, vocab_size: int) -> tuple[Engine, Shape]:
    from megatron_lite.config.schema import Precision

    shape = Shape(vocab_size, Precision.fp32)
    return build_rank(rank, folder, layout, shape, GLOBAL_BATCH), shape


def _savers(engine: Engine, checkpoints: Path) -> dict[bool, Any]:
    """One saver for each mode, keyed by whether it is asynchronous.

    The asynchronous one has saved once already, so that its memory is allocated, as in a long run.
    """
    from megatron_lite.checkpoint.retention import Kept
    from megatron_lite.checkpoint.saving import Saver

    kept = Kept(keep_last=1, keep_every=0, keep_best=0)
    savers = {
        asynchronous: Saver(checkpoints / "ours", _plan(engine), {}, kept, asynchronous=asynchronous)
        for asynchronous in (False, True)
    }
    savers[True].save(*_state(engine))
    savers[True].wait()
    savers[True].reports.clear()
    return savers


def _plan(engine: Engine) -> Any:
    from functools import partial

    from megatron_lite.checkpoint.file_plan import FilePlan, shapes_of_all_ranks
    from megatron_lite.models.hf import stored_form

    return FilePlan.of(shapes_of_all_ranks(engine.shards.shapes()), partial(stored_form, engine.config.model))


def _state(engine: Engine) -> tuple[Any, Any]:
    from megatron_lite.checkpoint.state import CheckpointState, OptimizerState
    from megatron_lite.train.checkpoints import layout_of

    moments = OptimizerState("adamw", engine.shards.updates, ("exp_avg", "exp_avg_sq"))
    layout = layout_of(engine.config, engine.context)
    state = CheckpointState(1, GLOBAL_BATCH, layout, "fp32", moments, None, "bench", True, None)
    return engine.shards.fragments(), state


def _load(engine: Engine, checkpoints: Path) -> None:
    """All that a resume does: find the newest complete checkpoint, check every byte, read this rank's slices."""
    from megatron_lite.checkpoint.loading import load, newest_complete

    found = newest_complete(checkpoints / "ours", print)
    assert found is not None
    plan = _plan(engine)
    load(found[0], plan, engine.shards.fragments(), plan.sets)
    engine.shards.weights_changed()


def _measure(found: dict[str, list[float]], name: str, do: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Seconds until the slowest rank is done."""
    import torch.distributed as dist

    dist.barrier()
    began = time.perf_counter()
    do(*args, **kwargs)
    dist.barrier()
    found.setdefault(name, []).append(time.perf_counter() - began)


def _finish(rank: int, folder: Path, found: dict[str, list[float]]) -> None:
    import torch.distributed as dist

    if rank == 0:
        (folder / "result.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
