"""`python -m megatron_lite.checkpoint`, word for word."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as fuzzing
from hypothesis import strategies as st

from megatron_lite.checkpoint.__main__ import main
from megatron_lite.checkpoint.state import STATE_FILE, CheckpointState, Layout, LossScaleState
from megatron_lite.config.compose import compose
from megatron_lite.config.frozen import as_containers
from tests.unit.checkpoint.examples import SHARD, STATE, WEIGHTS, save
from tests.unit.remedies import obeys

Command = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: object) -> tuple[int, list[str], list[str]]:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return run


@cache
def settings() -> dict[str, Any]:
    return as_containers(compose("pretrain_gpt", ["train.run_dir=run"]))


def state_with(**changes: object) -> CheckpointState:
    content = json.loads(json.dumps(settings()))
    content["train"].update({"seed": changes.pop("seed", 1234)})
    return replace(STATE, config=content, **changes)  # type: ignore[arg-type]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Three checkpoints of one run, of which the newest is truncated."""
    for step in (100, 200, 300):
        loss = {100: 3.5, 200: 4.0}.get(step)
        save(tmp_path / "checkpoints", step, state_with(validation_loss=loss), fill=step)
    shard = tmp_path / "checkpoints" / "step_00000300" / SHARD
    shard.write_bytes(shard.read_bytes()[:-8])
    return tmp_path


def test_inspect_takes_the_newest_complete_one(run_folder: Path, command: Command) -> None:
    assert command("inspect", run_folder) == (
        0,
        [
            f"checkpoint      {run_folder}/checkpoints/step_00000200",
            "state           complete, judging by file sizes",
            "step            200, after 6,400 samples",
            "saved by        dp2 tp2 pp2 zero1, fp32",
            "optimizer       adamw after 100 updates: exp_avg, exp_avg_sq",
            "validation      loss 4",
            "parameters      16",
            "names           those of transformers",
            "weights         216 B in 2 files: 2 tensors, F32",
            "exp_avg         208 B in 1 file: 2 tensors, F32",
            "exp_avg_sq      208 B in 1 file: 2 tensors, F32",
            "other files     config.json, manifest.json, training/state.json",
            "data            fingerprint b5c1",
            "versions        unknown",
        ],
        [],
    )
    assert command("inspect", run_folder / "checkpoints") == command("inspect", run_folder)


def test_inspect_shows_a_damaged_one_when_it_is_named(run_folder: Path, command: Command) -> None:
    (run_folder / "checkpoints/step_00000100/model-00001-of-00002.safetensors").unlink()
    code, lines, _ = command("inspect", run_folder / "checkpoints/step_00000100")
    assert code == 0
    assert lines[1] == "state           model-00001-of-00002.safetensors is missing"


def test_inspect_lists_tensors(run_folder: Path, command: Command) -> None:
    _, lines, _ = command("inspect", run_folder, "--tensors")
    at = lines.index("weights")
    assert lines[at - 1 : at + 5] == ["", "weights", "  wte.weight  F32 [3, 4]", "  ln_f.bias  F32 [4]", "", "exp_avg"]


def test_inspect_for_programs(run_folder: Path, command: Command) -> None:
    code, lines, _ = command("inspect", run_folder, "--json", "--tensors")
    found = json.loads("\n".join(lines))
    assert code == 0
    assert (found["parameters"], found["problem"], found["state"]["samples"]) == (16, None, 6400)
    assert found["state"]["layout"]["tensor_parallel_size"] == 2
    assert found["kinds"]["weights"]["tensors"]["ln_f.bias"] == {"dtype": "F32", "shape": [4], "file": SHARD}
    assert "tensors" not in json.loads("\n".join(command("inspect", run_folder, "--json")[1]))["kinds"]["weights"]


def test_verify_reports_all_that_is_wrong(run_folder: Path, command: Command) -> None:
    checkpoints = run_folder / "checkpoints"
    (checkpoints / ".step_00000400.incomplete").mkdir()
    moments = checkpoints / "step_00000300/training/exp_avg.safetensors"
    content = bytearray(moments.read_bytes())
    content[-1] ^= 1
    moments.write_bytes(content)
    (checkpoints / "step_00000300/config.json").unlink()
    (checkpoints / "step_00000100/manifest.json").unlink()
    code, lines, _ = command("verify", run_folder)
    assert code == 1
    size = sum(path.stat().st_size for path in (checkpoints / "step_00000200").rglob("*") if path.is_file())
    size -= (checkpoints / "step_00000200/manifest.json").stat().st_size
    assert lines == [
        "step_00000300  damaged",
        "  config.json is missing",
        f"  {SHARD} is 80 bytes; the manifest says 88",
        "  training/exp_avg.safetensors has other content than the manifest says",
        f"step_00000200  complete: 6 files, {size / 1024:.3g} KiB",
        "step_00000100  damaged",
        "  it has no manifest.json, so it was never finished",
        ".step_00000400.incomplete  a save or removal that is in progress or was killed: the next save removes it",
    ]
    code, lines, _ = command("verify", checkpoints / "step_00000200")
    assert (code, len(lines)) == (0, 1)


def test_diff_of_equal_ones(run_folder: Path, command: Command) -> None:
    folder = run_folder / "checkpoints/step_00000200"
    assert command("diff", folder, run_folder) == (0, ["6 tensors, bitwise equal"], [])


def test_diff_shows_settings_state_and_tensors(run_folder: Path, tmp_path: Path, command: Command) -> None:
    other = state_with(
        seed=7,
        layout=Layout(1, 1, 4, 1, sequence_parallel=False),
        optimizer=replace(STATE.optimizer, step=98),
        loss_scale=LossScaleState(32768.0, 12, 2),
        validation_loss=3.0,
        versions={"torch": "2.6"},
    )
    weights = {"wte.weight": WEIGHTS["wte.weight"] + np.float32(0.25), "ln_f.weight": np.ones(4, np.float32)}
    folder = save(tmp_path / "other", 200, other, weights=weights, fill=200)
    code, lines, _ = command("diff", run_folder, folder)
    assert code == 1
    seed = "it determines the order of the data, and so which samples are left to train on"
    tensors = [
        "tensors",
        "  weights: wte.weight: max abs 0.25",
        "  weights: ln_f.bias: only in the first",
        "  exp_avg: ln_f.bias: only in the first",
        "  exp_avg_sq: ln_f.bias: only in the first",
        "  weights: ln_f.weight: only in the second",
        "  exp_avg: ln_f.weight: only in the second",
        "  exp_avg_sq: ln_f.weight: only in the second",
        "7 tensors differ, 2 are bitwise equal",
    ]
    assert lines == [
        "settings",
        f"  forbidden  train.seed: 1234 -> 7; {seed}",
        "state",
        "  layout: dp2 tp2 pp2 zero1 -> dp1 tp1 pp4 zero1",
        "  optimizer: name adamw, step 100, moments exp_avg+exp_avg_sq -> name adamw, step 98, moments "
        "exp_avg+exp_avg_sq",
        "  loss_scale: None -> scale 32768, steps_since_change 12, hysteresis_left 2",
        "  validation_loss: 4 -> 3",
        "  versions: none -> torch 2.6",
        *tensors,
    ]
    assert command("diff", run_folder, folder, "--only-tensors")[:2] == (1, tensors)


def test_settings_alone_make_a_difference(run_folder: Path, tmp_path: Path, command: Command) -> None:
    folder = save(tmp_path / "other", 200, state_with(seed=7, validation_loss=4.0), fill=200)
    assert command("diff", run_folder, folder)[0] == 1
    assert command("diff", run_folder, folder, "--only-tensors")[0] == 0


def names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir() if path.is_dir())


def test_prune_says_what_goes(run_folder: Path, command: Command) -> None:
    checkpoints = run_folder / "checkpoints"
    code, lines, _ = command("prune", run_folder, "--keep-last", 1, "--dry-run")
    skipped = [
        f"Skipping step_00000300: {SHARD} is 80 bytes; the manifest says 88",
        f"{checkpoints}/latest names 'step_00000300', which is skipped; the newest complete one is step_00000200",
    ]
    stays = ["keep    step_00000300", "keep    step_00000200"]
    assert (code, lines[:-1]) == (0, [*skipped, *stays, "remove  step_00000100"])
    assert lines[-1].startswith("would free ")
    assert names(checkpoints) == ["step_00000100", "step_00000200", "step_00000300"]
    assert command("prune", run_folder, "--keep-last", 1, "--keep-best", 1)[1][4] == "keep    step_00000100"
    assert command("prune", run_folder, "--keep-last", 1, "--keep-every", 50)[1][4] == "keep    step_00000100"
    code, lines, _ = command("prune", checkpoints, "--keep-last", 1)
    assert (code, lines[:-1]) == (0, [*skipped, *stays, "remove  step_00000100"])
    assert lines[-1].startswith("freed ")
    assert names(checkpoints) == ["step_00000200", "step_00000300"]


@obeys("megatron_lite/checkpoint/__main__.py:_prune")
def test_prune_without_a_complete_one_removes_nothing(run_folder: Path, command: Command) -> None:
    """Also where all sizes are right: what is kept must be intact."""
    checkpoints = run_folder / "checkpoints"
    for step in (100, 200):
        (checkpoints / f"step_{step:08d}" / SHARD).write_bytes(bytes(88))
    code, _, errors = command("prune", run_folder, "--keep-last", 1)
    verify = f"python -m megatron_lite.checkpoint verify {checkpoints}"
    assert (code, errors) == (
        2,
        [
            f"error: {checkpoints} holds no complete checkpoint, so nothing is removed; `{verify}` shows what is wrong "
            "with each"
        ],
    )
    assert len(names(checkpoints)) == 3
    code, lines, _ = command(*verify.split()[3:])
    assert code == 1
    assert [line for line in lines if not line.startswith(" ")] == [f"step_{n:08d}  damaged" for n in (300, 200, 100)]


@pytest.mark.parametrize("name", ["inspect", "verify", "diff", "prune"])
@obeys("megatron_lite/checkpoint/__main__.py:_prune")
@obeys("megatron_lite/checkpoint/__main__.py:_verify")
def test_no_checkpoint_is_one_clear_error(name: str, tmp_path: Path, command: Command) -> None:
    further = {"diff": [tmp_path], "prune": ["--keep-last", 1]}.get(name, [])
    code, lines, errors = command(name, tmp_path, *further)
    assert (code, lines) == (2, [])
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {tmp_path} holds no checkpoint")
    assert "; give a " in errors[0]
    save(tmp_path / "checkpoints", 100, state_with())
    assert command(name, tmp_path, *further)[0] == 0


def test_errors_name_the_file(run_folder: Path, command: Command) -> None:
    folder = run_folder / "checkpoints/step_00000200"
    (folder / STATE_FILE).write_text("{")
    code, _, errors = command("inspect", folder)
    assert code == 2
    assert errors[0].startswith(f"error: {folder}/{STATE_FILE} is damaged: ")
    code, _, errors = command("inspect", run_folder / "checkpoints/step_00000300")
    assert code == 2
    assert errors[0].startswith(f"error: {run_folder}/checkpoints/step_00000300/{SHARD} is cut off or damaged: ")


COMMANDS = (["inspect"], ["inspect", "--json"], ["verify"], ["diff"], ["prune", "--keep-last", "1", "--dry-run"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to be damaged: each test leaves it as it was."""
    return save(tmp_path_factory.mktemp("whole") / "checkpoints", 100, state_with())


@given(data=st.data())
@fuzzing(max_examples=100, deadline=None)
def test_any_damaged_byte_of_any_file_is_an_error_of_ours(whole: Path, data: st.DataObject) -> None:
    """No command ends in a traceback, whatever byte of whatever file is changed, added or lost."""
    file = data.draw(st.sampled_from(sorted(path for path in whole.rglob("*") if path.is_file())))
    content = file.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    other = data.draw(st.one_of(st.binary(max_size=3), st.sampled_from([b"[" * 50_000, b'{"a":' * 50_000, b"\0" * 8])))
    command = data.draw(st.sampled_from(COMMANDS))
    try:
        file.write_bytes(content[:position] + other + content[position + data.draw(st.integers(0, 9)) :])
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as errors:
            paths = [str(whole)] * (2 if command[0] == "diff" else 1)
            code = main([command[0], *([str(whole.parent)] if command[0] == "prune" else paths), *command[1:]])
        assert code in (0, 1, 2)
        assert (code == 2) == errors.getvalue().startswith("error: ")
    finally:
        file.write_bytes(content)


@obeys("megatron_lite/checkpoint/inspection.py:_configuration")
def test_settings_of_another_version(run_folder: Path, tmp_path: Path, command: Command) -> None:
    folder = save(tmp_path / "other", 200, replace(STATE, config={"flavour": 1}), fill=200)
    code, _, errors = command("diff", run_folder, folder)
    assert code == 2
    assert errors[0].startswith(f"error: {folder}: this version cannot read the configuration: ")
    assert errors[0].endswith("; compare with --only-tensors")
    assert command("diff", run_folder, folder, "--only-tensors")[0] == 0


def test_invalid_number(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["prune", str(run_folder), "--keep-last", "-1"])
    assert caught.value.code == 2
    assert "argument --keep-last" in capsys.readouterr().err


def test_no_command_imports_torch(run_folder: Path) -> None:
    program = (
        "import sys; from megatron_lite.checkpoint.__main__ import main; folder = sys.argv[1];"
        "main(['inspect', folder]), main(['verify', folder]), main(['diff', folder, folder]);"
        "main(['prune', folder, '--keep-last', '1']);"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(run_folder)], check=True, capture_output=True)
