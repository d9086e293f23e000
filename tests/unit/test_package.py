"""`pip install .`, not from a checkout: everything that a run needs is in the package, and is found from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [path.name for path in ROOT.glob("pretrain_*.py")]
SOURCES = ["launch", "megatron_lite", "pyproject.toml", "README.md", "LICENSE", *SCRIPTS]
KINDS = (".py", ".yaml", ".j2")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip has installed a copy of the project into."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    target = tmp_path_factory.mktemp("target")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-compile"]
    done = subprocess.run([*command, "--target", str(target), str(tree)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tree)
    return target


def test_every_preset_and_template_is_installed(installed: Path) -> None:
    for package in ("launch", "megatron_lite"):
        ours = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*") if path.suffix in KINDS}
        assert {path for path in ours if not (installed / path).is_file()} == set()


def test_it_runs_from_any_folder(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text("name: mine\nhidden_size: 96")
    words = ["pretrain_gpt", "experiment=demo", "model=mine", "launcher=torchrun", "--dry-run"]
    done = subprocess.run(
        [str(installed / "bin" / "megatron-lite"), *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "pretrain_gpt: mine on 8 processes (cpu); dry run, nothing is started" in done.stdout
    assert "presets of your own\n  conf/model/mine.yaml\n" in done.stdout
    assert f" {installed / 'pretrain_gpt.py'} --config runs/demo/config-" in done.stdout
