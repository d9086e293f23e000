"""docs/adding_an_objective.md, followed to the letter in a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.observe.metrics import read_metrics
from tests.integration.runs import REPOSITORY as ROOT

LARGEST = 60  # lines to write for a new objective
EDIT = re.compile(r"\*\*\d\. `([^`]+)`\*\*(?: behind `([^`]+)`)?\n\n```\w*\n(.*?)```", re.DOTALL)
SIZES = ["model.num_layers=2", "model.hidden_size=32", "data.seq_length=32", "data.tokenizer_vocab_size=512"]


def edits() -> list[tuple[str, str, str]]:
    """File, the line behind which to write (empty for a new file), and what to write."""
    return EDIT.findall((ROOT / "docs" / "adding_an_objective.md").read_text())


def follow(tree: Path) -> None:
    for name, anchor, text in edits():
        path = tree / name
        if not anchor:
            assert not path.exists()
            path.write_text(text)
            continue
        before, found, after = path.read_text().partition(anchor + "\n")
        assert found, f"{name} has no line {anchor!r}"
        path.write_text(before + found + text + after)


@pytest.mark.slow
def test_new_objective_trains(tmp_path: Path) -> None:
    assert len(edits()) == 6
    assert sum(len(text.splitlines()) for _, _, text in edits()) < LARGEST
    tree = tmp_path / "project"
    for name in ("launch", "megatron_lite"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pretrain_gpt.py", tree)
    follow(tree)
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
