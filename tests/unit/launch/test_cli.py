"""The command line: errors and dry runs are light, complete and leave no trace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from megatron_lite.config.compose import compose
from megatron_lite.config.derived import resolve
from megatron_lite.config.frozen import freeze

ROOT = Path(__file__).parents[3]
HEAVY = ("torch", "deepspeed", "transformers", "datasets", "pandas", "matplotlib", "wandb", "plotly")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every command runs in an empty folder, which it must leave empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def errors_of(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    """Lines on stderr of a command that must end with 2 and say nothing else."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["pretrain_gpt", "model.hiden_size=3"], 2),
        (["pretrain_gpt", "parallel.tensor_parallel_size=3"], 2),
        (["pretrain_gpt", "experiment=demo", "--dry-run"], 0),
        (["pretrain_gpt", "experiment=gpt3_175b", "launcher=deepspeed", "--dry-run"], 0),
        (["pretrain_gpt", "experiment=gpt3_1b3", "launcher=slurm", "launcher.gpus_per_node=32", "--dry-run"], 0),
        (["status", "runs/none"], 2),
        (["--help"], 0),
    ],
)
def test_no_heavy_import(elsewhere: Path, argv: list[str], code: int) -> None:
    program = (
        "import sys; from launch.cli import main; code = main(sys.argv[1:]); "
        f"print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, *argv],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert finished.returncode == code
    assert finished.stderr.splitlines()[-1] == "", "imported although nothing is computed"
    assert list(elsewhere.iterdir()) == []


def test_every_problem_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = errors_of(capsys, "pretrain_gpt", "parallel.tensor_parallel_size=3", "train.global_batch_size=33")
    assert lines == [
        "error: parallel.tensor_parallel_size=3 must divide model.num_attention_heads=4; use 1, 2 or 4",
        "error: parallel.tensor_parallel_size=3 must divide model.ffn_hidden_size=512; set model.ffn_hidden_size to "
        "510 or 513",
        "error: train.global_batch_size=33 must be a multiple of train.micro_batch_size x data-parallel size = 4 x 1 = "
        "4; use 32 or 36",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "error: no script is named; write `python -m launch SCRIPT [SETTING ...]` with one of pretrain_bert, "
         "pretrain_gpt, pretrain_t5"),
        (["model=gpt_tiny"], "error: no script is named; write `python -m launch SCRIPT [SETTING ...]` with one of "
         "pretrain_bert, pretrain_gpt, pretrain_t5"),
        (["pretrain_gtp"], "error: 'pretrain_gtp' is not a script; did you mean pretrain_gpt? (choose one of "
         "pretrain_bert, pretrain_gpt, pretrain_t5)"),
        (["statuss", "RUN"], "error: statuss is neither a command nor a script; did you mean status?"),
        (["eval", "RUN"], "error: eval is neither a command nor a script; did you mean evaluate?"),
        (["pretrain_gpt", "--dryrun"], "error: --dryrun is not an option; did you mean --dry-run?"),
        (["pretrain_gpt", "--zzz=3"], "error: --zzz is not an option; options are --dry-run, --cfg, --conf, --config, "
         "--multirun, --debug, --help, --version; settings are written key=value, without dashes"),
        (["pretrain_gpt", "--config", "x.yaml"], "error: --config x.yaml names its script; leave out pretrain_gpt"),
        (["--config", "x.yaml"], "error: --config x.yaml: No such file or directory; give a config-*.yaml of a run "
         "folder"),
        (["pretrain_gpt", "--config"], "error: --config needs a file; give a config-*.yaml of a run folder"),
        (["pretrain_gpt", "launcher.device=cuda"], "error: launcher.device=cuda needs a GPU for each process and torch "
         "sees none here; use launcher.device=cpu"),
    ],
)  # fmt: skip
def test_wrong_command_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert errors_of(capsys, *argv) == [message]


def test_traceback_only_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert errors_of(capsys, "pretrain_gpt", "lr=1") == [
        "error: lr is not a setting; did you mean optimizer.learning_rate?"
    ]
    lines = errors_of(capsys, "pretrain_gpt", "lr=1", "--debug")
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "error: lr is not a setting; did you mean optimizer.learning_rate?"


def test_folder_of_another_run_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], elsewhere: Path
) -> None:
    freeze(resolve(compose("pretrain_gpt", ["train.run_dir=run"]), device="cpu"), elsewhere / "run")
    (elsewhere / "run" / "metrics.jsonl").write_text("{}\n")
    (line,) = errors_of(capsys, "pretrain_gpt", "train.run_dir=run", "train.seed=1")
    assert line.startswith("error: train.seed=1 cannot continue from 1234 of the run in train.run_dir=run (config-")


def test_dry_run_shows_what_has_changed_since(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    config = resolve(compose("pretrain_gpt", ["train.run_dir=run"]), device="cpu")
    freeze(config, elsewhere / "run")
    (elsewhere / "run" / "metrics.jsonl").write_text("{}\n")
    words = ["train.run_dir=run", "launcher.device=cpu", "optimizer.weight_decay=0.2", "parallel.zero_stage=2"]
    assert main(["pretrain_gpt", *words, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert (
        "changed since the run in this folder last ran\n"
        "  resets     optimizer.weight_decay: 0.1 -> 0.2; updates from here on use the new value\n"
        "  safe       parallel.zero_stage: 1 -> 2\n\n"
    ) in text


def test_dry_run_refuses_what_names_no_source(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    """All of them, also where no size has to be known from them."""
    words = ["data.source=[x.jsonl.zst,embedded]", "data.validation_source=s3://b/y.jsonl", "model.vocab_size=9000"]
    assert main(["pretrain_gpt", *words, "launcher.device=cpu", "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "data.source[0]=x.jsonl.zst: x.jsonl.zst is not a file (looked from " in captured.err
    assert "data.validation_source=s3://b/y.jsonl is a URL" in captured.err
    (elsewhere / "x.jsonl.zst").write_text("x")
    assert main(["pretrain_gpt", words[0], "launcher.device=cpu", "--dry-run"]) == 0


def test_dry_run_shows_the_plan(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    words = ["parallel=dp2_tp2_pp2", "launcher.device=cpu", "launcher.master_port=29123", "train.run_dir=run"]
    assert main(["pretrain_gpt.py", *words, "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[0] == "pretrain_gpt: gpt_tiny on 8 processes (cpu); dry run, nothing is started"
    for expected in (
        "world size       8 = 2 data x 2 tensor x 2 pipeline",
        "batch            32 = 4 micro x 4 micro-batches x 2 data-parallel",
        "vocabulary       8,192 padded to 8,192 = 4,096 rows x 2 tensor-parallel (multiple of 128)",
        "  MASTER_PORT=29123",
        "command of each rank, with RANK and LOCAL_RANK from 0 to 7, WORLD_SIZE=8",
    ):
        assert expected in lines
    config_file = next(line.strip() for line in lines if line.startswith("  run/config-"))
    assert lines[-1] == f"  {sys.executable} {ROOT / 'pretrain_gpt.py'} --config {config_file}"
    assert list(elsewhere.iterdir()) == []


def test_frozen_configuration_repeats_its_run(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    config = resolve(compose("pretrain_gpt", ["parallel=dp2", "train.run_dir=run", "train.seed=7"]), device="cpu")
    path = freeze(config, elsewhere / "run")
    (elsewhere / "run" / "metrics.jsonl").write_text("{}\n")
    assert main(["--config", str(path), "--dry-run"]) == 0
    assert f"  run/{path.name}" in capsys.readouterr().out.splitlines(), "the same configuration, under the same name"


def test_settings_behind_a_frozen_configuration(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    config = resolve(compose("pretrain_gpt", ["train.run_dir=run", "train.steps=20"]), device="cpu")
    path = freeze(config, elsewhere / "run")
    (elsewhere / "run" / "metrics.jsonl").write_text("{}\n")
    assert main(["--config", str(path), "train.steps=5e1", "--dry-run"]) == 0
    assert "204,800 in 50 steps" in capsys.readouterr().out
    assert errors_of(capsys, "--config", str(path), "train.steps=x", "model=gpt2_124m", "train.sed=3") == [
        "error: train.steps=x is not possible: train.steps must be an integer",
        "error: model=gpt2_124m names a preset, which would replace a whole group; set single values",
        "error: train.sed is not a setting; did you mean train.seed?",
    ]
    (problem,) = errors_of(capsys, "--config", str(path), "train.seed=3", "--dry-run")
    assert problem.startswith("error: train.seed=3 cannot continue from 1234 of the run in train.run_dir=run (config-")


def test_reader_that_has_seen_enough_is_no_error() -> None:
    command = (
        f"{sys.executable} -m launch pretrain_gpt experiment=gpt3_175b --dry-run | head -1; echo ${{PIPESTATUS[0]}}"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, timeout=120)
    assert (finished.stdout.splitlines()[1:], finished.stderr) == (["0"], "")


def test_layout_that_this_machine_cannot_start(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    (line,) = errors_of(capsys, "pretrain_gpt", "experiment=gpt3_175b", "launcher.device=cpu")
    assert line.startswith("error: the layout needs 3072 processes, and this machine has no 3072 GPUs and only ")
    assert list(elsewhere.iterdir()) == []


def test_help_lists_flags_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "--dry-run" in text
    assert "gpt2_124m" in text


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("launcher.environment={WANDB_API_KEY: hunter2}", "launcher.environment.WANDB_API_KEY"),
        ("launcher.environment.HF_TOKEN=hunter2", "launcher.environment.HF_TOKEN"),
        ("launcher.srun_arguments=['--export=ALL,DB_PASSWORD=hunter2']", "launcher.srun_arguments"),
        ("data.source=https://me:hunter2@host/x.txt", "data.source"),
        ("data.tokenizer=https://me:hunter2@host/x", "data.tokenizer"),
        ("model.init_from=https://me:hunter2@host/x", "model.init_from"),
        ("train.run_dir=s3://me:hunter2@host/x", "train.run_dir"),
        ("launcher.environment={HTTPS_PROXY: 'http://me:hunter2@proxy'}", "launcher.environment.HTTPS_PROXY"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--debug"], ["train.global_batch_size=33"]])
def test_a_secret_is_refused_without_being_shown(
    capsys: pytest.CaptureFixture[str], elsewhere: Path, word: str, key: str, more: list[str]
) -> None:
    """Also beside other mistakes, whose messages might show it."""
    assert main(["pretrain_gpt", "train.run_dir=run", word, *more]) == 2
    captured = capsys.readouterr()
    assert "hunter2" not in captured.out + captured.err
    assert f"{key} " in captured.err
    assert list(elsewhere.iterdir()) == []
