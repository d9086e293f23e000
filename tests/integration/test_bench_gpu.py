"""`make bench-gpu` is ready for the minutes on a GPU: the same program runs at tiny size on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_cases import CASES, Model
from tests.integration.runs import REPOSITORY


def test_trial_on_the_cpu(tmp_path: Path) -> None:
    saved = tmp_path / "figures.json"
    words = ["--tiny", "--skip-tests", "--eager-only", "--steps", "1", "--systems", "engine", "nanogpt"]
    command = [sys.executable, "-m", "benchmarks.gpu", *words, "--cases", "GPT tiny", "--json", str(saved)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(saved.read_text())
    rows = found["cases"]["GPT tiny"]
    assert rows["nanogpt"] == "give a checkout of nanoGPT: --nanogpt DIR"
    assert rows["nanogpt"] in done.stdout
    ours = rows["engine"]
    assert len(ours["seconds_per_step"]) == 1
    assert ours["loss"] == pytest.approx(6.24, abs=0.2)
    assert ours["kernels_per_step"] > 1000
    assert ours["peak_bytes"] > 2**20
    assert found["device"]["fp32_gemm_flops"] > 1e9
    assert found["device"]["copy_bytes_per_second"] > 1e8


def test_flops_by_the_customary_formula() -> None:
    """Of GPT 1.3B: 6 N + 12 L h s, 24 layers of 2,048 at 2,048 positions."""
    model = Model.of(CASES["GPT 1.3B"], parameters=1_315_575_808)
    assert model.customary == 6 * 1_315_575_808 + 12 * 24 * 2048 * 2048
    assert 0.80 < model.needed / model.customary < 0.95  # causal attention counts half, position embeddings nothing


def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torch sees no GPU; use --tiny" in done.stderr
