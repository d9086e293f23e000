"""Follows docs/adding_an_objective.md literally, in a copy of the project."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.observe.metrics import read_metrics
from tests.recipes import copy_project, count_lines, edits_of, follow

LARGEST = 60  # most lines that a new objective may need
SIZES = ["model.num_layers=2", "model.hidden_size=32", "data.seq_length=32", "data.tokenizer_vocab_size=512"]


@pytest.mark.slow
def test_new_objective_trains(tmp_path: Path) -> None:
    edits = edits_of("adding_an_objective.md")
    assert len(edits) == 6
    assert count_lines(edits) < LARGEST
    tree = tmp_path / "project"
    copy_project(tree)
    follow(tree, edits)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(f"The number {i} comes after {i - 1} and before {i + 1}." for i in range(3000)))
    words = [
        "objective=backward_lm",
        "train.steps=3",
        "optimizer.warmup_steps=1",
        "train.run_dir=run",
        f"data.source={corpus}",
        *SIZES,
    ]
    command = [sys.executable, "-m", "launch", "pretrain_gpt", "parallel=pp2", *words]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    finished = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert len(read_metrics(tree / "run" / "metrics.jsonl")) == 3
