"""Errors of the user are reported once, with the name of the setting and exit code 2, before training starts."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.runs import REPOSITORY, Finished, launch, run, run_warm

TinyWords = Callable[..., list[str]]


def _require_one_clear_error(finished: Finished, *parts: str) -> None:
    assert finished.code == 2, f"{finished.code}\n{finished.out}\n{finished.err}"
    for part in parts:
        assert part in finished.err, finished.err
    assert finished.err.count("error:") == 1, finished.err
    assert "Traceback" not in finished.out + finished.err


def test_every_violation_at_once_and_nothing_written(tiny: TinyWords, tmp_path: Path) -> None:
    words = tiny("run", "parallel=dp3_tp3_pp2", "parallel.zero_stage=2", "data.seq_length=4096")
    finished = run(launch(*words))
    assert finished.code == 2
    for part in (
        "parallel.tensor_parallel_size=3",
        "parallel.zero_stage=2",
        "data.seq_length=4096",
        "global_batch_size",
    ):
        assert part in finished.err
    assert "Traceback" not in finished.err
    assert not (tmp_path / "run").exists()


def test_misspelt_key_is_answered_with_the_right_one(tiny: TinyWords, tmp_path: Path) -> None:
    finished = run(launch(*tiny("run", "model.hiden_size=64")))
    _require_one_clear_error(finished, "model.hiden_size", "model.hidden_size")
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_traceback(tiny: TinyWords) -> None:
    assert "Traceback" in run(launch(*tiny("run", "model.hiden_size=64", "--debug"))).err


@pytest.mark.parametrize(
    ("content", "parts"),
    [(b"", ("empty",)), (b"text\0\1\2" * 50, ("corpus.txt:1", "NUL character", "character 4 is U+0000"))],
    ids=["empty", "binary"],
)
def test_invalid_corpus(content: bytes, parts: tuple[str, ...], tiny: TinyWords, tmp_path: Path) -> None:
    source = tmp_path / "corpus.txt"
    source.write_bytes(content)
    words = tiny("run", f"data.source={source}", f"data.cache_dir={tmp_path / 'cache'}")
    _require_one_clear_error(run_warm(words), *parts)
    assert {path.name for path in (tmp_path / "cache").glob("*")} <= {".locks"}


@pytest.mark.slow
def test_truncated_shard_and_wrong_tokenizer(tiny: TinyWords, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    words = tiny("first", f"data.cache_dir={cache}", "parallel=dp2_tp1_pp1")
    run_warm(words).require_success()
    (prepared,) = (path for path in cache.iterdir() if (path / "prepared.json").exists())

    other = tmp_path / "tokenizer"
    shutil.copytree(prepared / "tokenizer", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    shard = prepared / "train-0"
    ready = [f"data.source={shard}", f"data.tokenizer={other}", f"data.cache_dir={tmp_path / 'second'}"]
    _require_one_clear_error(run_warm(tiny("second", *ready)), "data.tokenizer", "train-0")

    with shard.with_suffix(".bin").open("r+b") as file:
        file.truncate(shard.with_suffix(".bin").stat().st_size - 6)
    finished = run_warm(tiny("third", f"data.cache_dir={cache}", "parallel=dp2_tp1_pp1"))
    _require_one_clear_error(finished, "train-0.bin", "truncated")


@pytest.mark.slow
def test_run_folder_of_another_configuration(tiny: TinyWords) -> None:
    run_warm(tiny("run")).require_success()
    finished = run_warm(tiny("run", "data.seq_length=16", "optimizer.learning_rate=1e-4"))
    _require_one_clear_error(finished, "train.run_dir", "data.seq_length=32", "model.init_from=")


def test_folders_that_cannot_be_written(tiny: TinyWords) -> None:
    _require_one_clear_error(run_warm(tiny("run", "train.run_dir=/proc/runs")), "train.run_dir=/proc/runs")
    finished = run_warm(tiny("run", "data.cache_dir=/proc/shards"))
    _require_one_clear_error(finished, "data.cache_dir=/proc/shards")


def test_too_few_processes(tiny: TinyWords) -> None:
    script = str(REPOSITORY / "pretrain_gpt.py")
    by_hand = run([sys.executable, script, *tiny("run", "parallel=dp2_tp2_pp1")])
    _require_one_clear_error(by_hand, "1 process", "4", "torchrun")
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2", script]
    few = run([*torchrun, *tiny("run", "parallel=dp2_tp2_pp1")])
    assert few.code != 0  # torchrun's exit code for a failed rank
    assert "world_size=2" in few.err or "2 were started" in few.err or "2 processes" in few.err, few.err


@pytest.mark.slow
def test_dead_rank_ends_the_others_with_its_name(tiny: TinyWords, tmp_path: Path) -> None:
    import psutil

    from tests.integration.runs import end_tree, losses, start

    process = start(launch(*tiny("run", "parallel=dp2_tp1_pp2", "train.steps=5000", "train.save_interval=0")))
    try:
        deadline = time.monotonic() + 120
        while len(losses(tmp_path / "run")) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        ranks = [child for child in psutil.Process(process.pid).children() if child.is_running()]
        assert len(ranks) == 4
        ranks[2].kill()
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            end_tree(process.pid)
    assert process.returncode == 137
    assert "rank 2 (pp1 dp0 tp0) was killed by signal 9" in err
