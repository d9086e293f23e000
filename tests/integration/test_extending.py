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


RECIPES = ("A setting", "A metric of the logits", "A term of the loss", "A parameter in a block")


def recipes() -> dict[str, list[Edit]]:
    return {name: edits_of("extending.md", name) for name in RECIPES}


def run(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the project after all recipes."""
    copy_project(tmp_path / "project", "tests", "pyproject.toml", "docs/getting_started.md")
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
    config = [
        f"tests/unit/config/test_{name}.py" for name in ("ranges", "changes", "facts")
    ]  # whether settings are complete
    finished = run(tree, "pytest", "-n0", "-k", "not test_changes or every_setting", *own, *config)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    paths = [edit.file for recipe in recipes().values() for edit in recipe]
    linted = run(tree, "ruff", "check", *(path for path in paths if path.endswith(".py")))
    assert linted.returncode == 0, linted.stdout


def test_a_setting_whose_field_lacks_a_fact_fails_with_the_remedy(tmp_path: Path) -> None:
    declare, *_ = edits_of("extending.md", "A setting")
    copy_project(tmp_path)
    follow(tmp_path, [declare])
    schema = tmp_path / declare.file
    right = schema.read_text()
    explain = ("launch", "explain", "train.eval_from")
    for fact, problem in {
        ", range=ranges.STEPS_OR_0": "is a number without a range; write range=ranges.NAME, of ",
        ", resume=SAFE": "does not say what another value does to a run that resumes; write resume=SAFE, or",
    }.items():
        assert fact in declare.text
        schema.write_text(right.replace(declare.text, declare.text.replace(fact, "")))
        finished = run(tmp_path, *explain)
        assert finished.returncode != 0
        assert f"train.eval_from {problem}" in finished.stderr
    schema.write_text(right)
    finished = run(tmp_path, *explain)
    assert finished.returncode == 0, finished.stderr
    shown = [" ".join(line.split()) for line in finished.stdout.splitlines()]
    assert "on resume safe: the run continues with the new value" in shown


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
