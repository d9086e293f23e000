"""The documentation keeps its promises: no placeholder, no dead link, no file or preset that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_lite.config.decays import Decay
from megatron_lite.config.preset_folders import PresetFolders

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))),
)
FIRST_SCREEN = 40  # lines
ROOM = ("", "megatron_lite", "docs")  # what paths are relative to
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|ya?ml|toml|j2|png))(?::\w+)?`")
TO_BE_WRITTEN = re.compile(r"\*\*\d+\. `([^`]+)`\*\*|to `(conf/[^`]+)`")  # files that a page asks its reader to write


@pytest.mark.parametrize("page", PAGES)
def test_no_placeholder_and_no_dead_link(page: str) -> None:
    text = (ROOT / page).read_text()
    assert "@@" not in text
    assert "TODO" not in text
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", text):
        found = (ROOT / page).parent / target if target else ROOT / page
        assert found.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(found), f"{page} links to {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    missing = missing_files((ROOT / page).read_text())
    assert not missing, f"{page} names {missing}; write the path from the root or from megatron_lite/"


def test_a_file_that_does_not_exist_is_found() -> None:
    text = "`train/loop.py` and `train/mending.py`, `tests/unit/test_gone.py`; copy it to `conf/launcher/mine.yaml`"
    assert missing_files(text) == ["train/mending.py", "tests/unit/test_gone.py"]


def missing_files(text: str) -> list[str]:
    written = {path for paths in TO_BE_WRITTEN.findall(text) for path in paths}
    named = [path for path in PATH.findall(text) if path not in written and not path.startswith("runs/")]
    return [path for path in named if not any((ROOT / room / path).exists() for room in ROOM)]


def test_methods_that_the_architecture_names_exist() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "megatron_lite").rglob("*.py"))
    page = (ROOT / "ARCHITECTURE.md").read_text()
    methods = re.findall(r"`([A-Z]\w+)\.(\w+)(?:\(.*?\))?`", page)
    assert len(methods) > 10
    for owner, method in methods:
        found = re.search(rf"^class {owner}\b(.*?)(?=^class |\Z)", sources, re.MULTILINE | re.DOTALL)
        assert found is not None, f"ARCHITECTURE.md names the class {owner}"
        assert re.search(rf"\b{method}\b *[(:=]", found[1]), f"ARCHITECTURE.md names {owner}.{method}"


def test_one_train_step_fits_a_screen() -> None:
    section = (ROOT / "ARCHITECTURE.md").read_text().partition("\n## One train step\n")[2].partition("\n## ")[0]
    assert 10 < len(section.splitlines()) <= 40


def test_first_screen_of_the_readme() -> None:
    """What it is, the two commands, and what works."""
    screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:FIRST_SCREEN])
    for needed in ("make train", "make test", "## What works", "| [spikes]"):
        assert needed in screen


def test_the_readme_links_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert [page for page in PAGES[1:] if f"]({page})" not in text] == []


def test_presets_that_are_named_exist() -> None:
    page = (ROOT / "docs" / "getting_started.md").read_text()
    models = re.search(r"choose a model \| (.+?), or any size", page)
    assert models is not None
    named = {name.removeprefix("model=") for name in re.findall(r"`([^`]+)`", models[1])}
    assert named == set(PresetFolders().groups()["model"])


def test_decays_of_the_page_exist() -> None:
    listed = re.search(r"`optimizer\.decay=(.+?) \(\[formulas\]", (ROOT / "docs" / "getting_started.md").read_text())
    assert listed is not None
    assert set(re.findall(r"(\w+)`", listed[1])) == set(Decay)
