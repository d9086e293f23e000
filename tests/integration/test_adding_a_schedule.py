"""Follows the section on schedules of docs/extending.md literally, in a copy of the project."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.recipes import copy_project, count_lines, edits_of, follow

MOST_FILES, MOST_LINES = 6, 60
TESTS = (
    "tests/unit/optim/test_learning_rate.py",
    "tests/unit/config/test_changes.py::test_every_setting_has_exactly_one_grade",
    "tests/unit/config/test_changes.py::test_what_resets_under_no_values_is_safe",
    "tests/unit/config/test_ranges.py::test_every_setting_has_an_entry",
)


def test_new_schedule_passes_the_tests_of_all_and_is_planned(tmp_path: Path) -> None:
    edits = edits_of("extending.md", "A learning-rate schedule")
    assert len(edits) == 4
    assert len({edit.file for edit in edits}) <= MOST_FILES
    assert count_lines(edits) <= MOST_LINES
    copy_project(tmp_path, "tests/__init__.py", "tests/unit/__init__.py", "tests/unit/optim", "tests/unit/config")
    follow(tmp_path, edits)
    checked = run(tmp_path, "pytest", "-v", "-p", "no:cacheprovider", *TESTS)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "[polynomial] PASSED" in checked.stdout
    words = ["optimizer.decay=polynomial", "optimizer.decay_power=2", "--dry-run"]
    planned = run(tmp_path, "launch", "pretrain_gpt", *words)
    assert "then decay=polynomial until step 300: to min_learning_rate by" in planned.stdout, planned.stderr


def run(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=300)
