"""What every entry script does around its own function."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import entry
from launch.cli import main
from launch.entry import run_script
from launch.environment import ERROR_FILE
from megatron_lite.config.compose import compose
from megatron_lite.config.derived import resolve
from megatron_lite.config.frozen import freeze
from megatron_lite.config.schema import RunConfig
from megatron_lite.data import FOLDER_VARIABLE
from megatron_lite.errors import ConfigError
from megatron_lite.observe import run_lock
from megatron_lite.observe.run_lock import Claim
from tests.unit.remedies import obeys

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", ERROR_FILE,
                  "TORCH_EXTENSIONS_DIR", "SLURM_STEP_NUM_TASKS", FOLDER_VARIABLE)  # fmt: skip


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A process that nobody launched, in an empty folder, with no data to prepare; its environment is restored."""
    before = dict(os.environ)
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(entry, "_make_ready", lambda config: None)
    monkeypatch.setattr(entry, "_prepare_data", lambda config: os.environ.update({FOLDER_VARIABLE: "made by a rank"}))
    monkeypatch.setattr(entry, "SILENCE_SECONDS", 0.0)
    monkeypatch.setattr(run_lock, "JOIN_SECONDS", 0.0)
    yield
    os.environ.clear()
    os.environ.update(before)


class Script:
    """A main function that records the configuration it was called with, or raises."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.config: RunConfig | None = None

    def __call__(self, config: RunConfig, claim: Claim) -> None:
        self.config, self.claim = config, claim
        if self.error:
            raise self.error


def as_rank(rank: int, size: int, **more: str) -> None:
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), **more})


def frozen_file(*words: str) -> Path:
    config = resolve(compose("pretrain_gpt", list(words)), device="cpu")
    return freeze(config, Path(str(config.train.run_dir)))


def test_world_of_one_by_hand() -> None:
    script = Script()
    assert run_script(script, "pretrain_gpt", ["train.steps=20", "train.run_dir=run"]) == 0
    assert script.config is not None
    assert (script.config.train.steps, script.config.launcher.device) == (20, "cpu")
    assert {name: os.environ[name] for name in RANK_VARIABLES[:4]} == {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"
    }  # fmt: skip
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert os.environ["TORCH_EXTENSIONS_DIR"].startswith(str(Path("run").absolute()))


@pytest.mark.parametrize("value", ["", "abc", "-1", "1.5", "1e3", "٣", 5000 * "9"])
def test_invalid_numbers_of_processes(value: str, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        os.environ[name] = value
        assert run_script(Script(), "pretrain_gpt", []) == 2
        assert "in the environment must be whole numbers, as torchrun, deepspeed or srun set them" in (
            capfd.readouterr().err
        )
        del os.environ[name]


@obeys("launch/entry.py:_world_size")
def test_by_hand_with_a_layout_of_many_says_how_to_start_it(capfd: pytest.CaptureFixture[str]) -> None:
    script = Script()
    assert run_script(script, "pretrain_gpt", ["parallel=dp2_tp2_pp2"]) == 2
    assert script.config is None
    assert capfd.readouterr().err == (
        "error: pretrain_gpt.py was started as 1 process, but the layout needs 8 = 2 data x 2 tensor x 2 pipeline; "
        "start it with `python -m launch pretrain_gpt ...` or `torchrun --nproc-per-node 8 pretrain_gpt.py ...`\n"
    )
    assert main(["pretrain_gpt", "parallel=dp2_tp2_pp2", "--dry-run"]) == 0
    for rank in (0, 7):
        as_rank(rank, 8, LOCAL_WORLD_SIZE="8")  # by torchrun
        assert run_script(script, "pretrain_gpt", ["parallel=dp2_tp2_pp2", "train.run_dir=run"]) == 0


@obeys("launch/entry.py:_world_size")
def test_srun_without_torchrun_makes_worlds_of_one(capfd: pytest.CaptureFixture[str]) -> None:
    os.environ["SLURM_STEP_NUM_TASKS"] = "8"
    script = Script()
    assert run_script(script, "pretrain_gpt", ["train.run_dir=run"]) == 2
    assert script.config is None
    error = capfd.readouterr().err
    assert error.startswith("error: srun has started 8 processes of pretrain_gpt.py, each a world of its own")
    assert "use `python -m launch pretrain_gpt launcher=slurm ...`" in error
    slurm = ["launcher=slurm", "launcher.nodes=1", "launcher.gpus_per_node=1"]
    assert main(["pretrain_gpt", *slurm, "--dry-run"]) == 0
    assert "srun --ntasks-per-node=1 torchrun --nproc-per-node GPUS" in error
    as_rank(0, 1, LOCAL_WORLD_SIZE="1", SLURM_STEP_NUM_TASKS="2")  # by torchrun
    assert run_script(script, "pretrain_gpt", ["train.run_dir=run"]) == 0


def test_one_process_within_a_large_allocation() -> None:
    os.environ.update({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"})
    script = Script()
    assert run_script(script, "pretrain_gpt", ["train.run_dir=run"]) == 0
    assert script.config is not None


def test_torchrun_decides_an_open_data_parallel_size() -> None:
    as_rank(3, 8, LOCAL_WORLD_SIZE="8")
    script = Script()
    assert run_script(script, "pretrain_gpt", ["parallel=tp2", "parallel.data_parallel_size=null"]) == 0
    assert script.config is not None
    assert script.config.parallel.data_parallel_size == 4


def test_too_few_processes_under_torchrun(capfd: pytest.CaptureFixture[str]) -> None:
    as_rank(0, 4)
    assert run_script(Script(), "pretrain_gpt", ["parallel=dp2_tp2_pp2"]) == 2
    assert capfd.readouterr().err == (
        "error: world_size=4 must be data x tensor x pipeline = 2 x 2 x 2 = 8; use 8 processes (dp=2), or "
        "the layout dp=2 tp=2 pp=1\n"
    )


def test_deepspeeds_name_for_the_local_size() -> None:
    as_rank(1, 2, LOCAL_SIZE="2")
    assert run_script(Script(), "pretrain_gpt", ["parallel=dp2"]) == 0
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"


def test_frozen_file_is_taken_as_it_is() -> None:
    path = frozen_file("parallel=tp2", "train.run_dir=run")
    as_rank(1, 2)
    script = Script()
    assert run_script(script, "pretrain_gpt", ["--config", str(path)]) == 0
    assert script.config == resolve(compose("pretrain_gpt", ["parallel=tp2", "train.run_dir=run"]), device="cpu")


def test_frozen_file_in_a_world_of_another_size(capfd: pytest.CaptureFixture[str]) -> None:
    path = frozen_file("parallel=tp2", "train.run_dir=run")
    as_rank(0, 3)
    assert run_script(Script(), "pretrain_gpt", ["--config", str(path)]) == 2
    assert "world_size=3 must be data x tensor x pipeline = 1 x 2 x 1 = 2" in capfd.readouterr().err


@obeys("launch/entry.py:_frozen_config")
def test_settings_beside_a_frozen_file_are_the_launchers(capfd: pytest.CaptureFixture[str]) -> None:
    path = frozen_file("train.run_dir=run")
    assert run_script(Script(), "pretrain_gpt", ["--config", str(path), "train.steps=3"]) == 2
    assert f"--config {path} is complete; leave out train.steps=3" in capfd.readouterr().err
    assert run_script(Script(), "pretrain_gpt", ["--config", str(path)]) == 0


@pytest.mark.parametrize("debug", [False, True])
def test_user_error_of_rank_0(capfd: pytest.CaptureFixture[str], debug: bool) -> None:
    script = Script(ConfigError("train.x=3 is bad; use 4"))
    words = ["train.run_dir=run", *(["--debug"] if debug else [])]
    assert run_script(script, "pretrain_gpt", words) == 2
    errors = capfd.readouterr().err
    assert errors.endswith("error: train.x=3 is bad; use 4\n")
    assert ("Traceback" in errors) is debug


def test_user_error_of_another_rank_is_reported_after_a_wait(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait is what torchrun needs to end this rank, should rank 0 have reported the same."""
    as_rank(1, 2)
    waited: list[float] = []
    monkeypatch.setattr(entry.time, "sleep", waited.append)
    monkeypatch.setattr(entry, "SILENCE_SECONDS", 3.0)
    assert run_script(Script(ConfigError("bad")), "pretrain_gpt", ["parallel=dp2"]) == 2
    assert waited == [3.0]
    assert capfd.readouterr().err == "error: bad\n"


def test_user_error_under_our_launcher_goes_to_its_file_once(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    os.environ[ERROR_FILE] = str(tmp_path / "logs" / "error.txt")
    path = frozen_file("parallel=dp2", "train.run_dir=run")
    for rank, text in ((1, "first"), (0, "second")):
        as_rank(rank, 2)
        assert run_script(Script(ConfigError(text)), "pretrain_gpt", ["--config", str(path)]) == 2
    assert (tmp_path / "logs" / "error.txt").read_text() == "error: first\n"
    assert [entry.name for entry in (tmp_path / "logs").iterdir()] == ["error.txt"]
    assert capfd.readouterr().err == ""


def test_error_reaches_the_terminal_although_the_run_had_sent_stderr_to_a_log(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def redirect_and_fail(config: RunConfig, claim: Claim) -> None:
        log = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 2)
        raise ConfigError("bad")

    saved = os.dup(2)
    try:
        assert run_script(redirect_and_fail, "pretrain_gpt", ["train.run_dir=run"]) == 2
    finally:
        os.dup2(saved, 2)
    assert capfd.readouterr().err == "error: bad\n"


def test_failure_of_ours_goes_to_the_log_with_a_line_on_the_terminal(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "run" / "logs" / "rank-0.log"
    log.parent.mkdir(parents=True)
    assert run_script(Script(ValueError("broken layer")), "pretrain_gpt", ["train.run_dir=run"]) == 1
    assert capfd.readouterr().err == ("error: rank 0 failed: ValueError: broken layer; see run/logs/rank-0.log\n")
    assert log.read_text().startswith("Traceback (most recent call last):")
    assert log.read_text().endswith("ValueError: broken layer\n")


def test_failure_before_there_is_a_log_shows_the_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_script(Script(ValueError("broken layer")), "pretrain_gpt", ["train.run_dir=run"]) == 1
    errors = capfd.readouterr().err
    assert errors.startswith("Traceback (most recent call last):")
    assert errors.endswith("ValueError: broken layer\n")


def test_ctrl_c_is_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_script(Script(KeyboardInterrupt()), "pretrain_gpt", ["train.run_dir=run"]) == 130
    assert capfd.readouterr().err == ""


def test_dry_run_of_a_script_is_that_of_the_launcher(capfd: pytest.CaptureFixture[str]) -> None:
    script = Script()
    assert run_script(script, "pretrain_gpt", ["parallel=dp2_tp2_pp2", "--dry-run"]) == 0
    assert script.config is None
    assert "world size       8 = 2 data x 2 tensor x 2 pipeline" in capfd.readouterr().out
    as_rank(1, 8)
    assert run_script(script, "pretrain_gpt", ["parallel=dp2_tp2_pp2", "--dry-run"]) == 0
    assert capfd.readouterr().out == "", "one rank speaks for all"


def test_cfg_and_version(capfd: pytest.CaptureFixture[str]) -> None:
    script = Script()
    assert run_script(script, "pretrain_gpt", ["train.steps=7", "optimizer.warmup_steps=1", "--cfg", "job"]) == 0
    assert "\n  steps: 7  # override\n" in capfd.readouterr().out
    path = frozen_file("parallel=dp2")
    assert run_script(script, "pretrain_gpt", ["--config", str(path), "--cfg", "job"]) == 0
    assert "\n  data_parallel_size: 2  # frozen\n" in capfd.readouterr().out
    assert run_script(script, "pretrain_gpt", ["--version"]) == 0
    assert capfd.readouterr().out.startswith("megatron_lite ")
    assert script.config is None


def test_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_script(Script(), "pretrain_gpt", ["--help"]) == 0
    assert capfd.readouterr().out.startswith("usage: python pretrain_gpt.py [SETTING ...]")


@pytest.mark.parametrize(
    ("words", "folder", "expected"),
    [
        ([], None, "made by a rank"),  # a node of a cluster
        ([], "made by the launcher", "made by the launcher"),
        (["--verify"], None, None),
    ],
)
def test_data_is_made_ready_by_the_ranks_where_no_launcher_could(
    monkeypatch: pytest.MonkeyPatch, words: list[str], folder: str | None, expected: str | None
) -> None:
    monkeypatch.setattr(entry, "_certify", lambda config: None)
    as_rank(1, 2)
    if folder is not None:
        os.environ[FOLDER_VARIABLE] = folder
    assert run_script(Script(), "pretrain_gpt", ["--config", str(frozen_file("parallel=dp2")), *words]) == 0
    assert os.environ.get(FOLDER_VARIABLE) == expected
