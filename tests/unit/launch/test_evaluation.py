"""What `python -m launch evaluate` refuses before anything starts, and what its ranks are given."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launch import evaluation
from launch.cli import main
from megatron_lite.checkpoint.folder import MANIFEST, FileRecord, folder_name
from megatron_lite.checkpoint.state import STATE_FILE, CheckpointState, Layout, OptimizerState
from megatron_lite.config.compose import compose
from megatron_lite.config.derived import resolve
from megatron_lite.config.frozen import as_containers
from megatron_lite.config.launcher import LauncherName
from megatron_lite.config.schema import OptimizerName
from megatron_lite.data.shards.prepare import prepare
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.files import file_xxh3
from megatron_lite.observe.evaluation import report_of
from megatron_lite.optim.moments import moments_of
from tests.unit.config.hf_folders import write_tokenizer
from tests.unit.remedies import obeys

STEP = 7
ROWS = 512


def write_checkpoint(checkpoints: Path, step: int) -> Path:
    """As far as the launcher looks into it: state, manifest, and the weights' headers, under our own names."""
    words = ["parallel=dp2_tp2_pp2", "launcher=torchrun", "train.steps=10", "parallel.offload_optimizer=true"]
    words += ["optimizer.warmup_steps=9", f"data.tokenizer_vocab_size={ROWS}"]
    config = resolve(compose("pretrain_gpt", words), world_size=8, device="cpu")
    folder = checkpoints / folder_name(step)
    (folder / STATE_FILE).parent.mkdir(parents=True)
    save_file({"embedding.weight": torch.zeros(ROWS, 4)}, folder / "model.safetensors")
    state = CheckpointState(
        step=step,
        samples=8 * step,
        layout=Layout(2, 2, 2, 1, False),
        precision="fp32",
        optimizer=OptimizerState("adamw", step, ("exp_avg", "exp_avg_sq")),
        loss_scale=None,
        data_fingerprint="f" * 32,
        hugging_face=False,
        validation_loss=None,
        config=as_containers(config),
    )
    (folder / STATE_FILE).write_text(state.as_text())
    files = {
        name: asdict(FileRecord((folder / name).stat().st_size, file_xxh3(folder / name)))
        for name in ("model.safetensors", STATE_FILE)
    }
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}))
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with two checkpoints."""
    monkeypatch.chdir(tmp_path)
    for step in (STEP - 1, STEP):
        write_checkpoint(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run"


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["evaluate", *words]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return captured.err


def test_the_newest_checkpoint_of_a_run_and_a_step(run: Path) -> None:
    newest = run / "checkpoints" / folder_name(STEP)
    assert evaluation.find_subject(str(run)).folder == newest
    assert evaluation.find_subject(str(run / "checkpoints")).folder == newest
    older = run / "checkpoints" / folder_name(STEP - 1)
    subject = evaluation.find_subject(str(older))
    assert subject.folder == older
    assert subject.name == f"run-{older.name}"


def test_ranks_have_no_moments_and_a_folder_of_their_own(run: Path) -> None:
    config = evaluation.configured(evaluation.find_subject(str(run)), [])
    assert moments_of(config.optimizer) == ()
    assert config.optimizer.name is OptimizerName.sgd
    assert not config.parallel.offload_optimizer
    assert config.launcher.name is LauncherName.local
    assert config.launcher.num_processes == 8
    assert config.model.vocab_size == ROWS
    folder = Path(str(config.train.run_dir)).absolute()
    assert run not in (folder, *folder.parents)
    assert not folder.exists()


def test_words_change_layout_launcher_and_number_of_batches(run: Path) -> None:
    words = ["parallel=dp2_tp1_pp1", "launcher=torchrun", "train.eval_batches=3", "train.run_dir=elsewhere"]
    config = evaluation.configured(evaluation.find_subject(str(run)), words)
    assert (config.launcher.name, config.launcher.num_processes) == (LauncherName.torchrun, 2)
    assert (config.train.eval_batches, config.train.run_dir) == (3, "elsewhere")


@pytest.mark.parametrize("key", ["data.source", "data.validation_source"])
def test_a_named_text_is_held_out_whole(run: Path, key: str) -> None:
    subject = evaluation.find_subject(str(run))
    plain = evaluation.configured(subject, [])
    config = evaluation.configured(subject, [f"{key}=text.txt"])
    assert (config.data.source, config.data.validation_source) == ("text.txt", "text.txt")
    assert (plain.data.source, plain.data.validation_source) == ("embedded", None)
    assert plain.train.run_dir != config.train.run_dir


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _zero_state(folder: Path) -> None:
    path = folder / STATE_FILE
    path.write_bytes(bytes(path.stat().st_size))


def _foreign_config(folder: Path) -> None:
    path = folder / STATE_FILE
    path.write_text(path.read_text().replace('"hidden_size"', '"hidden_sizf"'))


@obeys("launch/evaluation.py:_of_checkpoint")
@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (_truncate, ("model.safetensors is", "the manifest says")),
        (lambda folder: (folder / "model.safetensors").unlink(), ("model.safetensors is missing",)),
        (lambda folder: (folder / MANIFEST).unlink(), ("never finished",)),
        (_zero_state, ("state.json",)),
        (_foreign_config, ("hidden_sizf", "the version of megatron_lite that wrote it")),
    ],
)
def test_damaged_checkpoint(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    parts: tuple[str, ...],
) -> None:
    newest = run / "checkpoints" / folder_name(STEP)
    shutil.copytree(newest, tmp_path / "whole")
    damage(newest)
    message = refused(capsys, str(run))
    assert message.count("error:") == 1
    assert all(part in message for part in (*parts, str(newest)))
    if "or evaluate" in message:  # the remedy works
        named = message.rpartition("or evaluate ")[2].strip()
        assert evaluation.find_subject(named).folder == run / "checkpoints" / folder_name(STEP - 1)
    shutil.rmtree(newest)
    shutil.copytree(tmp_path / "whole", newest)
    assert evaluation.find_subject(str(run)).folder == newest


def test_no_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "nowhere is not a folder" in refused(capsys, "nowhere")
    assert "is not a folder" in refused(capsys, 5000 * "x")
    assert "~nobody-of-this-name/run is not a folder" in refused(capsys, "~nobody-of-this-name/run")
    assert "empty holds no checkpoint" in refused(capsys, "empty")
    assert "the following arguments are required: CHECKPOINT; see" in refused(capsys)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["model.hidden_size=3", "model=llama_tiny"], ("model is decided by", "model.hidden_size is decided by")),
        (["launcher=slurm"], ("launcher.name=slurm cannot evaluate",)),
        (["parallel=dp3"], ("train.global_batch_size",)),
        (["train.eval_batchs=3"], ("did you mean train.eval_batches?",)),
        (["optimizer=sgd"], ("optimizer=sgd names a preset",)),
        (["--jsn"], ("--jsn",)),
        (["train.run_dir="], ("train.run_dir='' is an empty path",)),
        (["train.run_dir=run"], ("train.run_dir=run holds a run; give the evaluation another folder",)),
        (["train.seed=1,2"], ("several values",)),
    ],
)
def test_wrong_words(run: Path, capsys: pytest.CaptureFixture[str], words: list[str], parts: tuple[str, ...]) -> None:
    message = refused(capsys, str(run), *words)
    assert all(part in message for part in parts), message


@obeys("launch/evaluation.py:configured")
def test_what_an_evaluation_takes_instead(run: Path) -> None:
    subject = evaluation.find_subject(str(run))
    for wrong, told, remedies in (
        ("launcher=slurm", "use launcher=torchrun within a job of yours, or launcher=local", ("torchrun", "local")),
        ("train.run_dir=run", "give the evaluation another folder, or none", ("train.run_dir=other", "")),
    ):
        with pytest.raises(ConfigError, match=told):
            evaluation.configured(subject, [wrong])
        for word in remedies:
            evaluation.configured(subject, [word if "=" in word else f"launcher={word}"] if word else [])


@obeys("launch/evaluation.py:prepare_text")
def test_held_out_text_that_has_changed(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    before = "\n\n".join(f"a document with the number {number}" for number in range(90))
    text.write_text(before)
    words = ["data.seq_length=8", "data.tokenizer_vocab_size=367", "data.validation_fraction=0.2"]
    words += ["train.eval_batches=1", "train.global_batch_size=4", f"data.source={text}"]
    words += [f"data.cache_dir={tmp_path / 'cache'}"]
    config = resolve(compose("pretrain_gpt", words), device="cpu")
    fingerprint = prepare(config, report=lambda line: None).fingerprint
    text.write_text(before.replace("a document", "another one"))
    with pytest.raises(DataError, match=r"bring back the earlier files, or name the text: data.source=FILE"):
        evaluation._preparation(fingerprint)(config)
    evaluation._preparation(None)(config)  # the text is named
    text.write_text(before)
    evaluation._preparation(fingerprint)(config)


@obeys("launch/evaluation.py:_require_fitting_tokenizer")
def test_tokenizer_that_is_too_large(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_tokenizer(folder, ROWS + 1)
    message = refused(capsys, str(run), f"data.tokenizer={folder}")
    assert f"has {ROWS + 1} tokens, and the weights of" in message
    assert f"have rows for {ROWS}; name the tokenizer that they were trained with" in message
    write_tokenizer(folder, ROWS)
    evaluation.configured(evaluation.find_subject(str(run)), [f"data.tokenizer={folder}"])


def test_dry_run_starts_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run), "--dry-run", "--all", "parallel=dp1_tp1_pp1"]) == 0
    shown = capsys.readouterr().out
    assert f"--evaluate {run / 'checkpoints' / folder_name(STEP)} --all" in shown
    assert not Path("runs").exists()


def test_report_of_a_diverged_model_is_json() -> None:
    figures = {"checkpoint": "c", "step": 1, "text": "t", "layout": "dp1", "samples": 2, "tokens": 3.0}
    report = report_of(
        **figures,
        loss=float("nan"),
        token_loss=1e9,
        accuracy=0.25,
        sequence_accuracy=None,  # type: ignore[arg-type]
    )
    assert json.loads(report.as_json(), parse_constant=pytest.fail)["loss"] is None
    assert '"tokens": 3,' in report.as_json()
    assert '"tokens": 3.5,' in replace(report, tokens=3.5).as_json()
    assert report.perplexity is None
    assert "no finite number" in report.table()
    assert "25.00%" in report.table()
    assert "class accuracy" in replace(report, sequence_accuracy=0.5).table()
