"""Follows docs/extending.md literally, the section on families, in a copy of the project; also with mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes import copy_project, count_lines, edits_of, follow

LARGEST_FILES, LARGEST_LINES = 6, 60  # of the recipe, including its tests
RECORDS = "megatron_lite/config/hf/decoders.py"
TESTS = ("tests/unit/models", "tests/distributed/test_model_parity.py", "tests/distributed/test_round_trip.py")


def run(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600)


def test_the_recipe_is_short() -> None:
    edits = edits_of("extending.md", "A family of transformers")
    assert 0 < len({edit.file for edit in edits}) <= LARGEST_FILES
    assert count_lines(edits) <= LARGEST_LINES


@pytest.mark.slow
def test_a_family_of_transformers(tmp_path: Path) -> None:
    tree, edits = tmp_path / "project", edits_of("extending.md", "A family of transformers")
    copy_project(tree, "tests", "pyproject.toml")
    follow(tree, edits)
    finished = run(tree, "pytest", "-v", "-n0", "-k", "starcoder2 or Starcoder2", *TESTS)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for test in ("families", "parameter_counts", "stored_forms", "layer_lists", "model_parity", "round_trip"):
        assert f"test_{test}.py ." in finished.stdout
    linted = run(tree, "ruff", "check", *(edit.file for edit in edits))
    assert linted.returncode == 0, linted.stdout

    whole = (tree / RECORDS).read_text()
    place = '        "layers.*.mlp.up": module("model.layers.*.mlp.c_fc"),\n'
    (tree / RECORDS).write_text(changed(changed(whole, place, ""), "mlp.c_proj", "mlp.down_proj"))
    finished = run(tree, "pytest", "-n0", "-k", "Starcoder2 and (place or tensors)", TESTS[0])
    assert finished.returncode == 1
    assert "add the module of layers.0.mlp.up.weight to `tensors` of starcoder2 (its record in" in finished.stdout
    assert "Starcoder2ForCausalLM has no {'model.layers.0.mlp.down_proj.weight': (32, 128)" in finished.stdout

    key, vocabulary = '            norm_epsilon=("norm_epsilon", 1e-5),\n', "    vocab_size=49152,\n"
    no_pad = f'{vocabulary}    tokens={{"pad_token_id": REMOVED}},\n'
    (tree / RECORDS).write_text(changed(changed(whole, key, ""), vocabulary, no_pad))
    finished = run(tree, "megatron_lite.config.hf.families")
    assert finished.returncode != 0
    assert "the family starcoder2: nothing is said of norm_epsilon, which every such model uses; add" in finished.stderr
    assert "no token is named for pad_token_id of config.json; add it to `tokens` with its roles" in finished.stderr


def changed(records: str, old: str, new: str) -> str:
    """With one change of the new record."""
    before, name, record = records.partition("STARCODER2")
    assert old in record
    return before + name + record.replace(old, new, 1)
