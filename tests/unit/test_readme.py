"""The first page keeps its promises: no placeholder, no dead link, no preset that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_lite.config.compose import preset_groups
from megatron_lite.config.decays import Decay

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")


@pytest.mark.parametrize("page", PAGES)
def test_no_placeholder_and_no_dead_link(page: str) -> None:
    text = (ROOT / page).read_text()
    assert "@@" not in text
    assert "TODO" not in text
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / target).exists(), f"{page} links to {target}"


def test_presets_of_the_readme_exist() -> None:
    models = re.search(r"choose a model \| (.+?), or any size", (ROOT / "README.md").read_text())
    assert models is not None
    named = {name.removeprefix("model=") for name in re.findall(r"`([^`]+)`", models[1])}
    assert named == set(preset_groups()["model"])


def test_decays_of_the_readme_exist() -> None:
    listed = re.search(r"`optimizer\.decay=(.+?) \(\[formulas\]", (ROOT / "README.md").read_text())
    assert listed is not None
    assert set(re.findall(r"(\w+)`", listed[1])) == set(Decay)
