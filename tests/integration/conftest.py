from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from tests.integration.runs import TINY
from tests.integration.slurm_cluster import Cluster, SlurmMissingError, running_cluster


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings for a small real corpus: the help texts of Python's `pydoc`, one document per topic."""
    folder = tmp_path_factory.mktemp("corpus")
    text = folder / "topics.jsonl"
    text.write_text("".join(json.dumps({"text": topic}) + "\n" for topic in topics.values()))
    return [
        f"data.source={text}",
        "data.validation_fraction=0.1",
        f"data.cache_dir={folder / 'prepared'}",
    ]


@pytest.fixture
def tiny(corpus: list[str], tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides for a tiny run in its own folder: `tiny("name", *more)`."""

    def words(name: str, *more: str) -> list[str]:
        return [*TINY, *corpus, f"train.run_dir={tmp_path / name}", *more]

    return words


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Slurm that commands of this process use. Skips if Slurm is missing, or fails where it must be present."""
    before = os.environ.get("SLURM_CONF")
    try:
        with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
            os.environ.update(cluster.environment)
            yield cluster
    except SlurmMissingError as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))
    finally:
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before
