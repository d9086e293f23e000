"""Several processes try to train in the same run folder, started in all possible ways."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.cli import main
from megatron_lite.errors import RunEnd
from megatron_lite.observe.markers import read_marker
from megatron_lite.observe.run_lock import holder_of
from tests.integration.runs import REPOSITORY, Finished, end_tree, launch, losses, run, start, wait_for_step

TinyWords = Callable[..., list[str]]
SCRIPT = str(REPOSITORY / "pretrain_gpt.py")
BESIDE_PYTHON = Path(sys.executable).parent


def finish(process: subprocess.Popen[str]) -> Finished:
    out, err = process.communicate(timeout=200)
    return Finished(process.returncode, out, err)


def test_same_script_twice_at_the_same_time(tiny: TinyWords, tmp_path: Path) -> None:
    """One trains all steps; the other reports who holds the lock, and leaves no trace."""
    words = [sys.executable, SCRIPT, *tiny("run", "train.steps=30", "train.save_interval=0", "train.eval_interval=0")]
    processes = []
    for _ in range(2):
        processes.append(start(words))
        time.sleep(0.5)
    ends = [finish(process) for process in processes]
    assert sorted(end.code for end in ends) == [0, 2], ends
    refused, pid = next((end, other.pid) for end, other in zip(ends, reversed(processes), strict=True) if end.code == 2)
    assert f"error: train.run_dir={tmp_path / 'run'} is in use by process {pid} on " in refused.err
    assert "Traceback" not in refused.out + refused.err
    assert sorted(losses(tmp_path / "run")) == list(range(1, 31))
    marker = read_marker(tmp_path / "run")
    assert marker is not None
    assert marker.end is RunEnd.DONE
    assert holder_of(tmp_path / "run") is None


@pytest.mark.slow
def test_every_way_to_start_is_refused_beside_a_run(tiny: TinyWords, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    one, two = ("parallel=dp1", "train.steps=5000"), ("parallel=dp2_tp1_pp1", "train.steps=5000")
    process = start(launch(*tiny("run", *one)))
    try:
        wait_for_step(process, run_dir, 2)
        for command in (
            launch(*tiny("run", *one)),
            launch(*tiny("run", *one, "launcher=torchrun")),
            launch(*tiny("run", *one, "launcher=deepspeed")),
            [sys.executable, SCRIPT, *tiny("run", *one)],
            [str(BESIDE_PYTHON / "torchrun"), "--standalone", "--nproc-per-node", "2", SCRIPT, *tiny("run", *two)],
            [str(BESIDE_PYTHON / "deepspeed"), "--no_local_rank", "--num_gpus", "2", "--master_port", "29513", SCRIPT,
             *tiny("run", *two)],
        ):  # fmt: skip
            refused = run(command)
            assert refused.code == (1 if "torchrun" in command[0] else 2), refused  # torchrun's own code
            assert f"train.run_dir={run_dir} is in use by process " in refused.err, refused.err
            assert "(rank 0)" in refused.err
            assert "Traceback (most recent call last):\n  File" not in refused.err.partition("error: train.run_dir")[0]
        assert process.poll() is None
        assert main(["cancel", str(run_dir)]) == 0
        end = finish(process)
    finally:
        if process.poll() is None:
            end_tree(process.pid)
    assert end.code == RunEnd.PREEMPTED, end
    steps = sorted(losses(run_dir))
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_run_that_was_killed_is_taken_over_at_once(tiny: TinyWords, tmp_path: Path) -> None:
    process = start(launch(*tiny("run", "train.steps=5000", "train.save_interval=0")))
    wait_for_step(process, tmp_path / "run", 2)
    holder = holder_of(tmp_path / "run")
    assert holder is not None
    assert holder.role == "rank 0"
    end_tree(process.pid)
    process.wait()
    again = run(launch(*tiny("run", "train.steps=4", "train.save_interval=0")))
    again.require_success()
    assert f"took over the lock of {tmp_path / 'run'} from process {holder.pid} on " in again.err
