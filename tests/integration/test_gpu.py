"""The same guarantees on CUDA and NCCL; needs as many GPUs as the layout has ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.integration.runs import REPOSITORY, losses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def _launch(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "launch", *words, "launcher.device=cuda"]
    return subprocess.run(command, env=environment, cwd=REPOSITORY, text=True, capture_output=True, timeout=400)


OFFLOADED = "parallel.offload_optimizer=true"
LAYOUTS = [
    (1, ["parallel=single"]),
    (1, ["parallel=single", "parallel.zero_stage=2", OFFLOADED]),
    (1, ["parallel=single", "parallel.zero_stage=3", OFFLOADED]),
    (2, ["parallel=tp2"]),
    (2, ["parallel=pp2"]),
    (8, ["parallel=dp2_tp2_pp2"]),
]


@pytest.mark.parametrize(("gpus", "layout"), LAYOUTS)
@pytest.mark.parametrize("model", ["gpt_tiny", "llama_tiny"])
def test_layout_is_certified(gpus: int, layout: list[str], model: str, tiny: Callable[..., list[str]]) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    finished = _launch("verify", "pretrain_gpt", *tiny("run", *layout, f"model={model}"))
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precision_follows_fp32(precision: str, tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    words = ["train.steps=30", "optimizer.learning_rate=1e-2", f"train.precision={precision}"]
    finished = _launch("pretrain_gpt", *tiny("run", *words))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    curve = losses(tmp_path / "run")
    assert curve[30][0] < curve[1][0] - 1.0
