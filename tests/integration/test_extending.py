"""Follows docs/extending.md literally in a copy of the project; also tests what a forgotten line leads to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes import Edit, copy_project, count_lines, edits_of, follow
from tests.unit.remedies import obeys

LARGEST_FILES, LARGEST_LINES = 6, 60  # of a recipe, including its tests
SIZES = ["model.num_layers=2", "model.hidden_size=32", "data.seq_length=32", "data.tokenizer_vocab_size=512"]


RECIPES = ("A metric of the logits", "A term of the loss", "A parameter in a block")


def recipes() -> dict[str, list[Edit]]:
    return {name: edits_of("extending.md", name) for name in RECIPES}


def run(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the project after all recipes."""
    copy_project(tmp_path / "project", "tests", "pyproject.toml")
    for edits in recipes().values():
        follow(tmp_path / "project", edits)
    return tmp_path / "project"


def test_recipes_are_short() -> None:
    for name, edits in recipes().items():
        assert 0 < len({edit.file for edit in edits}) <= LARGEST_FILES, name
        assert count_lines(edits) <= LARGEST_LINES, name


@pytest.mark.slow
def test_the_tests_of_the_recipes_pass(tree: Path) -> None:
    own = [edit.file for recipe in recipes().values() for edit in recipe if not edit.how]
    config = ["tests/unit/config/test_ranges.py", "tests/unit/config/test_changes.py"]  # whether settings are complete
    finished = run(tree, "pytest", "-n0", "-k", "not test_changes or every_setting", *own, *config)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    paths = [edit.file for recipe in recipes().values() for edit in recipe]
    linted = run(tree, "ruff", "check", *paths)
    assert linted.returncode == 0, linted.stdout


@obeys("megatron_lite/verify/layout_check.py:_require_equal")
@pytest.mark.slow
def test_a_forgotten_line_fails_with_the_remedy(tree: Path) -> None:
    measure, *_ = recipes()["A metric of the logits"]
    listed, attention = tree / measure.file, tree / "megatron_lite/models/attention.py"
    listed.write_text(listed.read_text().replace(measure.text, ""))
    finished = run(tree, "pytest", "-n0", "tests/unit/objectives/test_largest_logit.py")
    assert finished.returncode == 1
    assert "largest_logit was measured but is not listed; add it to STEP_MEASURES in" in finished.stdout
    assert "megatron_lite/observe/step_measures.py" in finished.stdout
    follow(tree, [measure])

    declared = ', partial_gradient="heads"'
    whole = attention.read_text()
    assert declared in whole
    attention.write_text(whole.replace(declared, ""))
    layout = ["parallel=dp1_tp2_pp1", "model.query_key_norm=true", f"train.run_dir={tree / 'run'}"]
    finished = run(tree, "launch", "verify", "pretrain_gpt", *layout, *SIZES)
    assert finished.returncode != 0
    output = finished.stdout + finished.stderr
    assert "tensor ranks have different gradients of" in output
    assert "layers.1.attention.query_norm.weight" in output
    assert 'partial_gradient="heads" or "sequence"' in output
    attention.write_text(whole)
    assert run(tree, "launch", "verify", "pretrain_gpt", *layout, *SIZES).returncode == 0
