"""Errors raised ahead of a run: following their remedies works."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import machine
from launch.cli import main
from launch.environment import passed_environment, require_numbers
from launch.evaluation import find_subject
from launch.follow import run_folder
from launch.hostfile import read_hostfile, with_hosts
from launch.nodes import own_node_rank
from launch.sweep import expand, require_own_folders
from megatron_lite.config.compose import change
from megatron_lite.config.frozen import freeze
from megatron_lite.config.schema import RunConfig
from megatron_lite.data.blend import normalised
from megatron_lite.data.shards.prepare import resolved_sources
from megatron_lite.data.tokenizer.framing import document_ends
from megatron_lite.errors import ConfigError, DataError, LaunchError, MegatronLiteError
from megatron_lite.train.step_samples import check_number
from megatron_lite.verify.synthetic import synthetic_vocabulary
from tests.unit.config.test_validate import config_of
from tests.unit.remedies import obeys


@obeys("launch/nodes.py:own_node_rank")
def test_the_rank_of_a_node() -> None:
    with pytest.raises(LaunchError, match=r"launcher.node_rank=0 to 2, or NODE_RANK in the environment"):
        own_node_rank(None, 3, {})
    assert [own_node_rank(rank, 3, {}) for rank in (0, 2)] == [0, 2]
    assert own_node_rank(None, 3, {"NODE_RANK": "2"}) == 2
    with pytest.raises(LaunchError, match=r"ranks of launcher.nodes=3, 0 to 2; correct it, or give launcher.node_rank"):
        own_node_rank(None, 3, {"NODE_RANK": "3"})
    assert own_node_rank(1, 3, {"NODE_RANK": "3"}) == 1


@obeys("launch/machine.py:choose_device", "launch/machine.py:require_capacity")
def test_what_a_machine_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus in (0, 3):
        with pytest.raises(LaunchError, match=r"use (a layout of 3 processes or )?launcher.device=cpu"):
            machine.choose_device("cuda", 8, gpus)
    assert machine.choose_device("cuda", 3, 3) == "cuda"
    assert machine.choose_device("cpu", 8, 0) == "cpu"
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    with pytest.raises(LaunchError) as error:
        machine.require_capacity(10_000, "cpu")
    most = re.search(r"at most (\d+) processes", str(error.value))
    assert most is not None
    machine.require_capacity(int(most[1]), "cpu")


@obeys("launch/environment.py:passed_environment", "launch/environment.py:require_numbers")
def test_variables_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = change(config_of(), ["launcher.pass_environment=[A_KEY]"])
    monkeypatch.delenv("A_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"`export A_KEY=...` in the shell that launches, or leave it out"):
        passed_environment(config)
    assert passed_environment(change(config, ["launcher.pass_environment=[]"])) == {}
    monkeypatch.setenv("A_KEY", "x")
    assert passed_environment(config) == {"A_KEY": "x"}
    with pytest.raises(LaunchError, match=r"^RANK='x' in the environment .* unset what"):
        require_numbers({"RANK": "x", "WORLD_SIZE": "2"})
    require_numbers({"WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("lines", "corrected"),
    [
        ("# none\n", "n1 slots=2\n"),
        ("n1\n", "n1 slots=8\n"),
        ("n1 slots=0\n", "n1 slots=1\n"),
        ("n1 slots=1\nn1 slots=1\n", "n1 slots=2\n"),
        ("n1 slots=1\nn2 slots=2\n", "n1 slots=2\nn2 slots=2\n"),
        ("n1 slots=99999999\n", None),
    ],
)
@obeys("launch/hostfile.py:read_hostfile", "launch/hostfile.py:_lines", "launch/hostfile.py:with_hosts")
def test_a_hostfile(lines: str, corrected: str | None, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    with pytest.raises(ConfigError, match="give a file of lines `HOST slots=N`"):
        read_hostfile(path)
    path.write_text(lines)
    with pytest.raises(ConfigError) as error:
        read_hostfile(path)
    if corrected is None:
        most = re.search(r"use at most (\d+)", str(error.value))
        assert most is not None
        corrected = f"n1 slots={most[1]}\n"
    path.write_text(corrected)
    hosts = read_hostfile(path)
    words = ["launcher.name=deepspeed", "launcher.num_processes=null"]
    config = change(config_of(), [*words, f"launcher.hostfile={path}"])
    wrong = change(config, [f"launcher.nodes={len(hosts) + 1}"])
    with pytest.raises(ConfigError, match=r"leave launcher.nodes out, or change the file"):
        with_hosts(wrong)
    assert with_hosts(config).launcher.nodes == len(hosts)
    path.write_text("".join(f"n{number} slots=1\n" for number in range(wrong.launcher.nodes)))
    assert with_hosts(wrong).launcher.nodes == wrong.launcher.nodes


@pytest.mark.parametrize(
    ("word", "corrected", "runs"),
    [
        ("train.seed=range(5,1)", "train.seed=range(1,5)", 4),
        ("train.seed=range(5,1)", "train.seed=1,2,3", 3),
        ("train.seed=interval(1,5)", "train.seed=range(1,5,2)", 2),
        ("train.seed=interval(1,5)", "train.seed=1,2", 2),
    ],
)
@obeys("launch/sweep.py:_values", "launch/sweep.py:_counted", "launch/sweep.py:expand")
def test_a_sweep(word: str, corrected: str, runs: int) -> None:
    with pytest.raises(ConfigError, match=r"KEY=A,B,C,? or KEY=range\(START,STOP"):
        expand(["pretrain_gpt", word])
    assert len(expand(["pretrain_gpt", corrected])) == runs
    with pytest.raises(ConfigError, match="give fewer values"):
        expand(["pretrain_gpt", "train.seed=range(0,100000)"])
    assert len(expand(["pretrain_gpt", "train.seed=range(0,10)"])) == 10


@obeys("megatron_lite/data/blend.py:normalised")
def test_weights_of_sources() -> None:
    for wrong, corrected in (([1.0], [1.0, 1.0]), ([1.0, -1.0], [1.0, 1.0]), ([0.0, 0.0], [0.0, 1.0])):
        with pytest.raises(ConfigError, match=r"; (give|correct) "):
            normalised(wrong, 2)
        assert sum(normalised(corrected, 2)) == 1


@obeys("megatron_lite/verify/synthetic.py:synthetic_vocabulary")
def test_a_vocabulary_for_the_layout_check() -> None:
    for size in (1, 5, 12, 13, 14, 50, 109, 113):
        for sentinels in (0, 1, 40, 100, 101):
            try:
                synthetic_vocabulary(size, sentinels)
            except ConfigError as error:
                least = int(str(error).rpartition("use ")[2].split()[0])
                assert least > size
                synthetic_vocabulary(least, sentinels)


@obeys("megatron_lite/train/step_samples.py:check_number")
def test_a_step_of_a_run() -> None:
    config = config_of("train.steps=7", "optimizer.warmup_steps=2")
    for step in (0, 8):
        with pytest.raises(DataError, match=r"give one from 1 to train\.steps=7"):
            check_number(step, config)
    check_number(1, config)
    check_number(7, config)


@obeys("megatron_lite/data/tokenizer/framing.py:_begin", "megatron_lite/data/tokenizer/framing.py:_unknown_eod")
def test_ends_of_documents() -> None:
    """`data.add_bos` of a tokenizer without such a token, and `data.eod_token` of a token that it does not have."""
    from megatron_lite.data.tokenizer.tokenizer_files import TokenizerJson
    from megatron_lite.state_files import decode

    text = b'{"model": {"vocab": {"a": 0, "<s>": 1, "</s>": 2}}, "added_tokens": [{"id": 2, "content": "</s>", '
    spec = decode(text + b'"special": true}, {"id": 1, "content": "<s>", "special": true}]}', TokenizerJson, "t")

    def ends(settings: dict[str, str], **data: object) -> object:
        given = SimpleNamespace(**({"add_bos": None, "eod_token": None, "tokenizer": "t"} | data))
        return document_ends(spec, settings, given, is_decoder=True, name="t")  # type: ignore[arg-type]

    named = {"eos_token": "</s>"}
    with pytest.raises(ConfigError, match=r"name one as bos_token in its tokenizer_config.json, or set data.add_bos="):
        ends(named, add_bos=True)
    ends(named | {"bos_token": "<s>"}, add_bos=True)
    ends(named, add_bos=False)
    with pytest.raises(ConfigError, match=r"use one of its special tokens: .*</s>"):
        ends(named, eod_token="<end>")
    ends(named, eod_token="</s>")


@obeys("launch/follow.py:run_folder", "launch/evaluation.py:find_subject")
def test_a_run_folder(tmp_path: Path) -> None:
    for word in (str(tmp_path / "missing"), str(tmp_path)):
        with pytest.raises(ConfigError, match=r"give (the|a) run folder"):
            run_folder(word)
        with pytest.raises(MegatronLiteError, match="give a run folder"):
            find_subject(word)
    (tmp_path / "config-0123456789ab.yaml").touch()
    assert run_folder(str(tmp_path)) == tmp_path


DRY = ["launcher.device=cpu", "--dry-run"]


@pytest.mark.parametrize(
    ("words", "told", "corrected"),
    [
        (DRY, "[SETTING ...]` with one of pretrain_bert, pretrain_gpt", ["pretrain_gpt", *DRY]),
        (["pretrain_gtp", *DRY], "did you mean pretrain_gpt?", ["pretrain_gpt", *DRY]),
        (["pretrain_gpt", "--config", "FROZEN", *DRY], "leave out pretrain_gpt", ["--config", "FROZEN", *DRY]),
        (["--config"], "give a config-*.yaml of a run folder", ["--config", "FROZEN", *DRY]),
        (["pretrain_gpt", "--dry-rum", *DRY], "did you mean --dry-run?", ["pretrain_gpt", *DRY]),
    ],
)
@obeys("launch/cli.py:_require_script", "launch/launching.py:_typed", "launch/arguments.py:_take")
@obeys("launch/launching.py:_script")
def test_a_command_line(
    words: list[str], told: str, corrected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = str(freeze(change(config_of(), [f"train.run_dir={tmp_path}"]), tmp_path))
    assert main([frozen if word == "FROZEN" else word for word in words]) == 2
    assert told in capsys.readouterr().err
    assert main([frozen if word == "FROZEN" else word for word in corrected]) == 0


@obeys("launch/sweep.py:require_own_folders")
def test_runs_of_a_sweep_that_share_a_folder() -> None:
    for words, is_well in ((["train.seed=1,1"], False), (["train.seed=1,2"], True)):
        points = expand(["pretrain_gpt", *words])
        folders = [Path(f"runs/{dict(point.varied)['train.seed']}") for point in points]
        if is_well:
            require_own_folders(points, folders)
        else:
            with pytest.raises(ConfigError, match="; give each value once"):
                require_own_folders(points, folders)


@obeys("megatron_lite/data/shards/prepare.py:resolved_sources")
def test_sources_and_what_is_held_out() -> None:
    for key, value, corrected in (("source", None, "embedded"), ("validation_fraction", 1.0, 0.02)):
        data = replace(RunConfig().data, **{key: value})
        with pytest.raises(ConfigError, match="; use "):
            resolved_sources(RunConfig(data=data))
        resolved_sources(RunConfig(data=replace(data, **{key: corrected})))
