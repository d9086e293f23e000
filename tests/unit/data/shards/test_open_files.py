"""Many sources under a low limit of open files: nothing stays open for the whole run, and the error says what to do."""

from __future__ import annotations

import errno
import gc
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.corpus.readers import read_documents
from megatron_lite.data.corpus.source_names import resolve_source
from megatron_lite.data.shards.arrays import map_file
from megatron_lite.errors import DataError, library_edge, remedy_of
from megatron_lite.files import raise_open_file_limit

REPOSITORY = Path(__file__).resolve().parents[4]
LIMIT = 64
SOURCES = 90
MANY_SOURCES = """
import resource, sys
from megatron_lite.config.schema import RunConfig
from megatron_lite.data.samples.loader import training_dataset, validation_dataset
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.data.samples.provenance import Provenance
from tests.unit.data.conftest import windows

limit, folder, sources = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
config = RunConfig()
config.data.source = [f"{folder}/{i}.txt" for i in range(sources)]
config.data.cache_dir = f"{folder}/cache"
config.data.tokenizer_vocab_size = 400
config.data.seq_length = 16
config.data.validation_fraction = 0.3
prepared = prepare(config, report=lambda line: None)
datasets = [training_dataset(prepared, config, windows(config)), validation_dataset(prepared, config, windows(config))]
provenance = Provenance(datasets[0], prepared)
files = {part.file for i in range(sources * 10) for part in provenance.documents(i)}
print(len(files), [len(dataset.sample(7).tokens) for dataset in datasets])
"""


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def lowest_free_descriptor() -> int:
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.close(descriptor)
    return descriptor


def maps_of(path: Path) -> int:
    return sum(line.endswith(f"{path}\n") for line in Path("/proc/self/maps").open())


@contextmanager
def soft_limit(files: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_maps_hold_no_descriptor_and_go_with_their_last_array(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    np.arange(5000, dtype=np.uint16).tofile(path)
    before = open_files()
    arrays = [map_file(path, np.uint16) for _ in range(20)]
    assert open_files() == before
    assert maps_of(path) == 20
    view = arrays[3][100:200]
    path.unlink()  # as a removed cache would
    assert view.tolist() == list(range(100, 200))
    with pytest.raises(ValueError, match="read-only"):
        arrays[0][0] = 1
    del arrays
    gc.collect()
    deleted = Path(f"{path} (deleted)")
    assert maps_of(deleted) == 1
    assert view.sum() == sum(range(100, 200))
    del view
    gc.collect()
    assert maps_of(deleted) == 0
    (tmp_path / "empty").touch()
    assert map_file(tmp_path / "empty", np.int32).tolist() == []


def test_more_sources_than_files_may_be_open(tmp_path: Path) -> None:
    for i in range(SOURCES):
        (tmp_path / f"{i}.txt").write_text("\n\n".join(f"source {i} has document {j}, word {i * j}" for j in range(12)))
    command = [sys.executable, "-c", MANY_SOURCES, str(LIMIT), str(tmp_path), str(SOURCES)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"{SOURCES} [17, 17]\n"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_running_out_of_files_says_how_to_get_more(
    tmp_path: Path, config_for: Callable[..., RunConfig], name: str
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    remedy = "; the process has reached its limit of open files; raise it, for example with `ulimit -n 4096`"
    path = tmp_path / name
    parquet.write_table(pa.table({"text": ["one"]}), path)
    config = config_for(path)
    source = resolve_source(str(path), "data.source")
    with soft_limit(lowest_free_descriptor()), pytest.raises(DataError) as error:
        list(read_documents(source, config.data))
    assert str(error.value).startswith(f"{path} (of data.source={path}) cannot be read")
    assert str(error.value).endswith(remedy)


def test_the_soft_limit_is_raised() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with soft_limit(100):
        raise_open_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EMFILE, "ulimit -n"), (errno.ENFILE, "fs.file-max"), (errno.ENOMEM, "max_map_count")]
)
def test_what_the_machine_has_run_out_of(number: int, remedy: str) -> None:
    """Whatever a library makes of it."""

    def library() -> None:
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise RuntimeError("An error occurred") from error

    with (
        pytest.raises(DataError, match=f"reading: RuntimeError: An error occurred; .*{remedy}"),
        library_edge(DataError, "reading", "name another file"),
    ):
        library()
    assert remedy_of(OSError(errno.ENOENT, "x"), "name another file") == "name another file"
    first, second = OSError(errno.ENOENT, "x"), RuntimeError("y")
    first.__context__, second.__cause__ = second, first  # raised again from within its own handler
    assert remedy_of(second, "name another file") == "name another file"
