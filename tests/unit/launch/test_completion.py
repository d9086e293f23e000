"""Completion: what shells offer, asked through a real bash, and without any heavy import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import VERBS, main
from launch.completion import candidates
from megatron_lite.checkpoint.__main__ import COMMANDS as CHECKPOINT_COMMANDS
from megatron_lite.config.keys import leaf_keys
from megatron_lite.config.preset_folders import PresetFolders
from megatron_lite.data.__main__ import COMMANDS as DATA_COMMANDS

ROOT = Path(__file__).parents[3]
ASK = """
source <(megatron-lite completion bash)
COMP_LINE="$1" COMP_POINT=${#COMP_LINE}
shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_megatron_lite
printf '%s\\n' "${COMPREPLY[@]}"
"""


def offered(*words: str) -> list[str]:
    """For the last word, behind those before it."""
    return candidates(["--", "megatron-lite", *words], VERBS)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(elsewhere: Path) -> Path:
    """A folder with the command `megatron-lite`."""
    folder = elsewhere / "bin"
    folder.mkdir()
    program = folder / "megatron-lite"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m launch "$@"\n')
    program.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("line", "words", "expected"),
    [
        ("stat", ["stat"], ["status"]),
        ("pretrain_gpt model=gpt_", ["pretrain_gpt", "model", "=", "gpt_"], ["gpt_tiny"]),
        ("pretrain_gpt parallel=", ["pretrain_gpt", "parallel", "="], PresetFolders().groups()["parallel"]),
        ("verify pretrain_gpt data.w", ["verify", "pretrain_gpt", "data.w"], ["data.weights="]),
    ],
)
def test_bash_is_given_what_replaces_the_last_part(
    command: Path, line: str, words: list[str], expected: list[str]
) -> None:
    """bash breaks words at `=`, and so wants what stands behind it alone."""
    asked = subprocess.run(
        ["bash", "-c", ASK, "ask", f"megatron-lite {line}", "megatron-lite", *words],
        env={**os.environ, "PATH": f"{command}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert asked.stdout.split() == expected


def test_first_word_is_a_script_a_verb_or_an_option() -> None:
    assert offered("") == sorted([*PresetFolders().scripts(), *VERBS, "--cfg", "--conf", "--config", "--debug",
                                  "--dry-run", "--help", "--multirun", "--version"])  # fmt: skip


def test_every_key_can_be_reached() -> None:
    """Key by key up to the next dot, as a shell shows them."""

    def reach(word: str) -> set[str]:
        found = offered("pretrain_gpt", word)
        inner = [reach(one) for one in found if one.endswith(".") and one != word]
        return set(found).union(*inner)

    assert {key.rstrip("=.") for key in reach("")} >= set(leaf_keys()) | set(PresetFolders().groups())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pretrain_gpt", "train.precision=f"], ["train.precision=fp16", "train.precision=fp32"]),
        (["pretrain_gpt", "debug="], ["debug=false", "debug=true"]),
        (["pretrain_gpt", "optimizer=adamw,s"], ["optimizer=adamw,sgd"]),
        (["pretrain_gpt", "train.steps="], []),
        (["pretrain_gpt", "--d"], ["--debug", "--dry-run"]),
        (["pretrain_gpt", "--cfg", ""], ["job"]),
        (["--config", ""], []),
        (["verify", "pretrain_b"], ["pretrain_bert"]),
        (["verify", "pretrain_gpt", "tracking=w"], ["tracking=wandb"]),
        (["evaluate", "RUN", "parallel=z"], ["parallel=zero2", "parallel=zero3"]),
        (["explain", "stability.max"], ["stability.max_rollbacks"]),
        (["status", ""], []),
        (["data", "prepare", "model=llama_t"], ["model=llama_tiny"]),
        (["data", "inspect", "model=llama_t"], []),
        (["completion", ""], ["bash", "zsh"]),
    ],
)  # fmt: skip
def test_what_is_offered(words: list[str], expected: list[str]) -> None:
    assert offered(*words) == expected


def test_presets_of_the_user_are_offered(elsewhere: Path) -> None:
    for folder, name in (("conf", "first"), ("other", "second")):
        (elsewhere / folder / "model").mkdir(parents=True)
        (elsewhere / folder / "model" / f"my_{name}.yaml").touch()
    assert offered("pretrain_gpt", "model=my") == ["model=my_first"]
    assert offered("pretrain_gpt", "--conf", "other", "model=my") == ["model=my_second"]
    assert offered("pretrain_gpt", "--conf", "nowhere", "model=my") == []


def test_commands_of_verbs_are_all_there() -> None:
    assert set(VERBS["data"].choices) == set(DATA_COMMANDS)
    assert set(VERBS["checkpoint"].choices) == set(CHECKPOINT_COMMANDS)


def test_shells_wait_for_no_heavy_import() -> None:
    program = (
        "import sys; from launch.cli import main; main(sys.argv[1:]); "
        "sys.exit([name for name in ('hydra', 'omegaconf', 'numpy', 'torch') if name in sys.modules] or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "complete", "--", "megatron-lite", "pretrain_gpt", "model="],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "model=gpt2_124m" in done.stdout.split()


def test_another_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 2
    assert "'fish' (choose from " in capsys.readouterr().err
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef megatron-lite\n")
