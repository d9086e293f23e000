"""`python -m megatron_lite.data`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lite.config.schema import RunConfig
from megatron_lite.data.__main__ import main
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.data.shards.prepared import PreparedData
from tests.unit.remedies import obeys


def test_prepare_then_inspect(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"data.source={corpus}", f"data.cache_dir={tmp_path}/cache", "data.tokenizer_vocab_size=510"]
    assert main(["prepare", *overrides, "data.validation_fraction=0.1"]) == 0
    output = capsys.readouterr().out
    assert "training a byte-level BPE of 510 tokens" in output
    found = re.search(r"(\S+)/prepared\.json: fingerprint (\w+)", output)
    assert found
    assert main(["inspect", found[1], "--verify", "--documents", "2"]) == 0
    output = capsys.readouterr().out
    assert found[2] in output
    assert output.count("checksums match") == 2
    assert "document 0, " in output
    assert re.search(r"document \d+: (alpha|beta)|'document \d+", output)


def test_inspect_a_pair(prepared_corpus: tuple[PreparedData, RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    prepared, _ = prepared_corpus
    assert main(["inspect", f"{prepared.train[0].prefix}.idx", "--verify"]) == 0
    output = capsys.readouterr().out
    assert f"{prepared.train_documents:,} documents, {prepared.train_tokens:,} tokens, uint16" in output
    assert "checksums match" in output
    assert f"hash {prepared.tokenizer_hash}" in output


def test_inspect_foreign_pair(
    prepared_corpus: tuple[PreparedData, RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    prepared, _ = prepared_corpus
    prepared.train[0].prefix.with_name("train-0.json").unlink()
    assert main(["inspect", str(prepared.train[0].prefix), "--verify"]) == 0
    assert "no sidecar: made by another tool, its tokenizer is unknown, no checksum" in capsys.readouterr().out


@obeys("megatron_lite/data/shards/inspection.py:_verify_pair")
def test_verify_finds_a_changed_byte(
    tmp_path: Path, prepared_corpus: tuple[PreparedData, RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    prepared, config = prepared_corpus
    path = prepared.train[0].prefix.with_name("train-0.bin")
    content = path.read_bytes()
    (tmp_path / "copy").mkdir()
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(path.with_suffix(suffix), tmp_path / "copy")
    damaged = content[:10] + bytes([content[10] ^ 1]) + content[11:]
    copy = tmp_path / "copy" / "train-0"
    for target, remedy in (
        (prepared.folder, f"remove {prepared.folder} to prepare it again"),
        (prepared.train[0].prefix, f"remove {prepared.folder} to prepare it again"),
        (copy, "copy it again from the original"),
    ):
        (path if target != copy else copy.with_suffix(".bin")).write_bytes(damaged)
        assert main(["inspect", str(target)]) == 0
        assert main(["inspect", str(target), "--verify"]) == 2
        said = rf"train-0\.bin has checksum \w+; it was written with \w+ \(damaged\); {re.escape(remedy)}\n"
        assert re.search(said, capsys.readouterr().err)
        if target == copy:
            copy.with_suffix(".bin").write_bytes(content)
        else:
            shutil.rmtree(prepared.folder)
            prepare(config, report=lambda line: None)
        assert main(["inspect", str(target), "--verify"]) == 0


@pytest.mark.parametrize("arguments", [["inspect", "/nowhere/x"], ["prepare", "data.source=missing.txt"]])
def test_user_errors_exit_with_2_and_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_wrong_override(capsys: pytest.CaptureFixture[str], silent: Callable[[str], None]) -> None:
    assert main(["prepare", "data.sauce=x"]) == 2
    assert "data.source" in capsys.readouterr().err


def test_prepare_checks_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["objective.noise_density=1.5", "data.validation_fraction=0"]
    assert main(["prepare", "--script", "pretrain_t5", *overrides]) == 2
    error = capsys.readouterr().err
    assert "objective.noise_density=1.5 must be more than 0 and less than 1; use a fraction such as 0.15" in error
    assert "data.validation_fraction=0 holds nothing out" in error
    assert main(["prepare", "--script", "pretrain_t5", "data.seq_length=2"]) == 2
    assert "data.seq_length=2 has no room for text beside" in capsys.readouterr().err


def test_prepare_asks_for_no_processes(tmp_path: Path, corpus: Path) -> None:
    words = [f"data.source={corpus}", f"data.cache_dir={tmp_path}/cache", "data.tokenizer_vocab_size=510"]
    assert main(["prepare", *words, "parallel=dp2_tp2_pp2", "launcher.num_processes=3"]) == 0
