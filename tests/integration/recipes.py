"""Pages of docs/ whose code blocks are changes to the project, and a copy of the project to make them in."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.integration.runs import REPOSITORY as ROOT

_EDIT = re.compile(r"\*\*\d+\. `([^`]+)`\*\*(?: (behind|in place of) `([^`]+)`)?\n\n```\w*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Edit:
    file: str
    how: str
    """"behind", "in place of", or "" for a new file."""
    line: str
    text: str

    def apply(self, tree: Path) -> None:
        path = tree / self.file
        if not self.how:
            assert not path.exists()
            path.write_text(self.text)
            return
        before, found, after = path.read_text().partition(self.line + "\n")
        assert found, f"{self.file} has no line {self.line!r}"
        path.write_text(before + (found if self.how == "behind" else "") + self.text + after)


def edits_of(page: str) -> list[Edit]:
    """The changes that a text asks for, in its order."""
    return [Edit(*found) for found in _EDIT.findall(page)]


def copy_project(tree: Path, *more: str) -> None:
    for name in ("conf", "launch", "megatron_lite", *more):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pretrain_gpt.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
