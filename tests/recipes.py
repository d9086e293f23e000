"""Pages of docs/ that say what to write where, followed to the letter in a copy of the project."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
EDIT = re.compile(r"\*\*\d+\. `([^`]+)`\*\*(?: (behind|in place of) `([^`]+)`)?\n\n```\w*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Edit:
    file: str
    how: str
    """`behind` or `in place of` the line; empty for a new file."""
    anchor: str
    """The line."""
    text: str


def edits_of(page: str, section: str | None = None) -> list[Edit]:
    """
    Args:
        page: name of a file in docs/.
        section: its heading, `## ` excluded; None = the whole page.
    """
    text = (ROOT / "docs" / page).read_text()
    if section is not None:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [Edit(*found) for found in EDIT.findall(text)]


def count_lines(edits: Sequence[Edit]) -> int:
    return sum(len(edit.text.splitlines()) for edit in edits)


def copy_project(tree: Path, *more: str) -> None:
    """What is needed to launch a GPT, and further files or folders."""
    for name in ("launch", "megatron_lite", "pretrain_gpt.py", *more):
        source, target = ROOT / name, tree / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)


def follow(tree: Path, edits: Sequence[Edit]) -> None:
    for edit in edits:
        path = tree / edit.file
        if not edit.how:
            assert not path.exists()
            path.write_text(edit.text)
            continue
        before, found, after = path.read_text().partition(edit.anchor + "\n")
        assert found, f"{edit.file} has no line {edit.anchor!r}"
        path.write_text(before + (found if edit.how == "behind" else "") + edit.text + after)
