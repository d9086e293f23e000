"""What people who know other launchers type: `--help` of anything, `--version`, `--cfg job`, `-m`, slips of verbs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

import megatron_lite
from launch.arguments import OF_HYDRA, OPTIONS
from launch.cli import VERBS, main
from launch.entry import run_script
from launch.follow import COMMANDS as FOLLOW_COMMANDS
from launch.local import LocalLauncher
from launch.watching import COMMANDS as WATCH_COMMANDS
from megatron_lite.config.frozen import load_frozen
from megatron_lite.config.preset_folders import PresetFolders

Run = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Lines of a command line's output; of its errors, where it has to end with 2."""

    def run_command(*argv: str, code: int = 0) -> list[str]:
        assert main(list(argv)) == code
        captured = capsys.readouterr()
        assert (captured.err if code == 0 else captured.out) == ""
        return (captured.out if code == 0 else captured.err).splitlines()

    return run_command


def test_verbs_are_all_there(run: Run) -> None:
    assert {*FOLLOW_COMMANDS, *WATCH_COMMANDS} < set(VERBS)
    text = "\n".join(run("--help"))
    for name in [*VERBS, *PresetFolders().scripts()]:
        assert f"\n  {name} " in text


def test_page_of_the_command_line_is_complete() -> None:
    page = (Path(__file__).parents[3] / "docs" / "command_line.md").read_text()
    for name in (*VERBS, *OPTIONS, *VERBS["data"].choices, *VERBS["checkpoint"].choices):
        assert re.search(rf"`(\w+ )?{name}\b", page), name


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    with pytest.raises(SystemExit) as end:  # argparse's; of the others ours
        sys.exit(main([verb, "--help"]))
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m launch {verb}")


@pytest.mark.parametrize("verb", VERBS)
def test_a_slip_of_a_verb_gets_its_suggestion(run: Run, verb: str) -> None:
    for slip in (verb[:-2] + verb[-1] + verb[-2], verb[:-1], verb + verb[-1]):  # swapped, missing, doubled
        expected = f"error: {slip} is neither a command nor a script; did you mean {verb}?"
        assert run(slip, "X", code=2) == [expected]
        assert run("--debug", slip, code=2)[-1:] == [expected]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["data", "prepar"], "prepar is not a command of `python -m launch data`; did you mean prepare? (choose one of "
         "prepare, inspect, add-tokens)"),
        (["checkpoint", "exprot", "RUN"], "exprot is not a command of `python -m launch checkpoint`; did you mean "
         "export? (choose one of inspect, verify, diff, prune, export)"),
        (["checkpoint", "inspect", "none"], "none holds no checkpoint; give a checkpoint, a run folder, or"),
        (["verify", "pretrain_gtp"], "'pretrain_gtp' is not a script; did you mean pretrain_gpt? (choose one of "
         "pretrain_bert, pretrain_gpt, pretrain_t5)"),
        (["explain", "train.stps"], "train.stps is not a setting; did you mean train.steps?"),
        (["pretrain_gpt", "--cfg"], "--cfg is not possible; write --cfg job"),
        (["pretrain_gpt", "--cfg", "all"], "--cfg all is not possible; write --cfg job"),
        (["pretrain_gpt", "--conf"], "--conf needs a folder; give one with presets of your own, such as --conf my"),
        (["pretrain_gpt", "--multirun=2"], "--multirun=2: --multirun takes no value; leave =2 out"),
        (["pretrain_gpt", "--config-dir", "x"], "--config-dir is Hydra's, and not an option here; presets of your own "
         "come with --conf DIR"),
    ],
)  # fmt: skip
def test_wrong_commands(run: Run, argv: list[str], message: str) -> None:
    (line,) = run(*argv, code=2)
    assert line.startswith(f"error: {message}")


@pytest.mark.parametrize("option", OF_HYDRA)
def test_options_of_hydra_are_named_as_such(run: Run, option: str) -> None:
    (line,) = run("pretrain_gpt", option, code=2)
    assert line == f"error: {option} is Hydra's, and not an option here; {OF_HYDRA[option]}"


def test_help_of_a_script(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("pretrain_bert", "--help")
    assert lines[:3:2] == [
        "usage: python -m launch pretrain_bert [SETTING ...] [OPTION ...]",
        "Pretrain an encoder (BERT, RoBERTa): masked tokens, with or without next-sentence prediction.",
    ]
    text = "\n".join(lines)
    assert "*bert_tiny" in text
    assert "*gpt_tiny" not in text
    assert "explain KEY" in text
    assert run_script(lambda config, claim: None, "pretrain_bert", ["--help"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == lines[1:]


def test_versions(run: Run) -> None:
    found = dict(line.split() for line in run("--version"))
    assert found["megatron_lite"] == megatron_lite.__version__
    assert found["torch"] == version("torch")
    assert set(found) >= {"deepspeed", "transformers", "python"}
    assert run("pretrain_gpt", "--version") == run("--version")


def test_multirun_is_what_commas_mean(run: Run) -> None:
    words = ["pretrain_gpt", "train.seed=1,2", "launcher.master_port=29123", "launcher.device=cpu", "--dry-run"]
    plain = run(*words)
    assert plain[0] == "2 runs, of which the first is planned below"
    assert run("-m", *words) == run(*words, "--multirun") == plain


def test_cfg_shows_where_values_come_from(run: Run, elsewhere: Path) -> None:
    (elsewhere / "conf" / "model").mkdir(parents=True)
    (elsewhere / "conf" / "model" / "mine.yaml").write_text("name: mine\nnum_query_groups: 2")
    words = ["pretrain_gpt", "experiment=demo", "model=mine", "parallel=dp2", "train.steps=60", "launcher.device=cpu"]
    words += ["launcher.environment.A='x # y'", r"data.document_separator=\n\n # \n", "optimizer.decay_steps=null"]
    lines = run(*words, "--cfg", "job")
    for expected in (
        "script: pretrain_gpt  # preset pretrain_gpt",
        "  num_query_groups: 2  # preset model/mine (conf/model/mine.yaml)",
        "  head_size: 32  # derived",
        "  norm_epsilon: 1.0e-05  # default",
        "  data_parallel_size: 2  # preset parallel/dp2",
        "  decay_steps: null  # override",
        "  learning_rate: 0.003  # preset experiment/demo",
        "  steps: 60  # override",
        "  micro_batch_size: 8  # preset train/demo",
        "    start: 0  # default",
        "  num_processes: 2  # derived",
        "  environment:  # override",
    ):
        assert expected in lines
    (elsewhere / "shown.yaml").write_text("\n".join(lines))
    shown = load_frozen("shown.yaml")
    assert (shown.launcher.environment, shown.data.document_separator) == ({"A": "x # y"}, "\n\n # \n")
    again = run("--config", "shown.yaml", "train.steps=70", "-c", "job")
    assert "  steps: 70  # override" in again
    assert "  learning_rate: 0.003  # frozen" in again
    assert [line.partition("  # ")[0] for line in again if " steps:" not in line] == [
        line.partition("  # ")[0] for line in lines if " steps:" not in line
    ]


def test_cfg_of_a_sweep_and_of_a_mistake(run: Run) -> None:
    lines = run("pretrain_gpt", "train.seed=1,2", "--cfg=job", "launcher.device=cpu")
    assert [line for line in lines if " seed:" in line] == ["  seed: 1  # override", "  seed: 2  # override"]
    assert lines[:2] == ["---", "# train.seed=1"]
    (line,) = run("pretrain_gpt", "train.global_batch_size=33", "--cfg", "job", code=2)
    assert "train.global_batch_size=33 must be a multiple" in line


def test_plan_names_presets_of_the_user(run: Run, elsewhere: Path) -> None:
    (elsewhere / "my" / "model").mkdir(parents=True)
    (elsewhere / "my" / "model" / "gpt_tiny.yaml").write_text("hidden_size: 96")
    words = ["pretrain_gpt", "--conf", "my", "launcher=torchrun", "launcher.nodes=2", "launcher.master_address=node0"]
    lines = run(*words, "parallel=dp2", "launcher.device=cpu", "--dry-run")
    place = lines.index("presets of your own")
    assert lines[place + 1] == "  my/model/gpt_tiny.yaml, instead of megatron_lite/conf/model/gpt_tiny.yaml"
    assert any("-m launch --conf my pretrain_gpt " in line for line in lines), "what is typed on each node"
    assert "presets of your own" not in run("pretrain_gpt", "launcher.device=cpu", "--dry-run")


def test_start_names_presets_of_the_user(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere / "conf" / "model").mkdir(parents=True)
    (elsewhere / "conf" / "model" / "mine.yaml").write_text("hidden_size: 96")
    monkeypatch.setattr(LocalLauncher, "run", lambda self, plan: 0)
    assert main(["pretrain_gpt", "model=mine", "launcher.device=cpu"]) == 0
    assert capsys.readouterr().out.startswith("preset of your own: conf/model/mine.yaml\npretrain_gpt: gpt_tiny on ")
