"""Sweeps: which runs they are, where each lies, and what becomes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import launching
from launch.base import LaunchPlan
from launch.cli import main
from launch.local import LocalLauncher
from launch.sweep import Point, expand, in_own_folder, table
from megatron_lite.config.compose import compose
from megatron_lite.config.derived import resolve
from megatron_lite.config.launcher import LauncherName
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import ConfigError, DataError

CPU = "launcher.device=cpu"


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words_of(*words: str) -> list[tuple[str, ...]]:
    return [point.overrides for point in expand(words)]


def test_one_run_for_each_combination() -> None:
    points = expand(["pretrain_gpt", "model.hidden_size=128,256", CPU, "train.seed=1,2"])
    assert [point.overrides for point in points] == [
        ("pretrain_gpt", f"model.hidden_size={size}", CPU, f"train.seed={seed}")
        for size in (128, 256)
        for seed in (1, 2)
    ]
    assert points[1].varied == (("model.hidden_size", "128"), ("train.seed", "2"))
    assert points[1].name == "model.hidden_size=128 train.seed=2"


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("train.seed=choice(1,5)", ["1", "5"]),
        ("train.seed=range(1,8,3)", ["1", "4", "7"]),
        ("model=gpt_tiny,llama_tiny", ["gpt_tiny", "llama_tiny"]),
        ("parallel=dp2,tp2_pp2", ["dp2", "tp2_pp2"]),
        ("data.source=[a,b],[c]", ["[a,b]", "[c]"]),
        ("data.source='a,b',c", ["'a,b'", "c"]),
        ("optimizer.decay_steps=null,10", ["null", "10"]),
    ],
)
def test_values_that_hydra_knows(word: str, values: list[str]) -> None:
    key = word.partition("=")[0]
    assert words_of(word) == [(f"{key}={value}",) for value in values]


@pytest.mark.parametrize("word", ["train.seed=1", "data.source=[a,b]", "train.generate_prompt='a,b'", "pretrain_gpt",
                                  "train.seed=(1", "optimizer.betas={a:1,b:2}"])  # fmt: skip
def test_one_value_is_no_sweep(word: str) -> None:
    assert expand([word]) == [Point((word,))]


def test_values_that_cannot_be_counted() -> None:
    with pytest.raises(ConfigError) as caught:
        expand(["optimizer.learning_rate=interval(0,1)", "model=glob(*)", "train.seed=1,2"])
    rule = "names no values one by one; write them as KEY=A,B,C or KEY=range(START,STOP,STEP)"
    assert caught.value.problems == [f"optimizer.learning_rate=interval(0,1) {rule}", f"model=glob(*) {rule}"]


def folders_of(*words: str) -> list[str]:
    folders = []
    for point in expand(words):
        config = in_own_folder(resolve(compose("pretrain_gpt", list(point.overrides)), device="cpu"), point)
        folders.append(config.train.run_dir)
    return folders


@pytest.mark.parametrize(
    ("words", "folders"),
    [
        (
            ["model.hidden_size=128,256", "train.seed=1"],
            [f"runs/pretrain_gpt-gpt_tiny-hidden_size_{size}" for size in (128, 256)],
        ),
        (["train.run_dir=x/y", "train.seed=1,2", "parallel=tp2,pp2"],
         [f"x/y-seed_{seed}-parallel_{layout}" for seed in (1, 2) for layout in ("tp2", "pp2")]),
        (["train.run_dir=x", "train.steps=1,2", "optimizer.decay_steps=9"], ["x-steps_1", "x-steps_2"]),
        (["train.run_dir=x,y"], ["x", "y"]),
        (["train.run_dir=x", "model.name=a,b", "objective.name=causal_lm"], ["x-name_a", "x-name_b"]),
        (["train.run_dir=x", "model.name=a", "train.seed=1"], ["x"]),
    ],
)  # fmt: skip
def test_folder_of_each_run(words: list[str], folders: list[str]) -> None:
    assert folders_of(*words) == folders


def test_folders_of_equal_last_names() -> None:
    words = ["train.run_dir=x", "model.name=a,b", "optimizer.name=adamw,sgd"]
    assert folders_of(*words)[0] == "x-model.name_a-optimizer.name_adamw"


def test_folder_is_one_name_that_every_file_system_takes_and_no_two_runs_share() -> None:
    long = "l" * 300
    folders = folders_of("train.run_dir=x", f"train.generate_prompt='a/b','a b','$(id)','ü',{long}1,{long}2")
    assert len(set(folders)) == 6
    for folder in folders:
        assert "/" not in folder
        assert folder.isascii()
        assert len(folder) < 200
        assert not set(folder) & set(" $()'\"")


def errors_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["pretrain_gpt", CPU, *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_every_problem_of_every_run_before_any_starts(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    assert errors_of(capsys, "train.seed=1,2", "model.hidden_size=128,130", "train.step=3") == [
        "error: train.step is not a setting; did you mean train.steps?"
    ]
    assert errors_of(capsys, "train.seed=range(1,6)", "model.hidden_size=128,130", "train.global_batch_size=33")[
        1:
    ] == [
        "error: train.seed=1 model.hidden_size=130; train.seed=2 model.hidden_size=130; train.seed=3 "
        "model.hidden_size=130 and 2 more: model.hidden_size=130 must be a multiple of model.num_attention_heads=4; "
        "use 128 or 132, or set model.head_size"
    ]
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("data.source=embedded,none.txt", "data.source=none.txt: data.source=none.txt: none.txt is not a file"),
        ("data.eod_token=<|endoftext|>,<none>", "data.eod_token=<none>: data.eod_token=<none> is not a token"),
    ],
)
def test_texts_of_every_run_before_any_starts(capsys: pytest.CaptureFixture[str], word: str, problem: str) -> None:
    (line,) = errors_of(capsys, word)
    assert line.startswith(f"error: {problem}")


def test_one_folder_for_two_runs_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert errors_of(capsys, "train.run_dir=x", "train.seed=1,1") == [
        "error: train.run_dir=x-seed_1 would be the folder of 2 runs (train.seed=1; train.seed=1); give each value once"
    ]


def test_dry_run_lists_all_runs_and_plans_the_first(capsys: pytest.CaptureFixture[str], elsewhere: Path) -> None:
    assert main(["pretrain_gpt", CPU, "train.run_dir=x", "train.seed=1,2", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == [
        "2 runs, of which the first is planned below",
        "run           run folder",
        "train.seed=1  x-seed_1",
        "train.seed=2  x-seed_2",
        "",
        "pretrain_gpt: gpt_tiny on 1 process (cpu); dry run, nothing is started",
    ]
    assert any(line.startswith("  x-seed_1/config-") for line in lines)
    assert list(elsewhere.iterdir()) == []


class Recorder(LocalLauncher):
    """Starts nothing; each run ends as `ends` says, with what an exception is."""

    ends: list[int | Exception] = []
    seen: list[RunConfig] = []
    environments: list[str | None] = []

    def run(self, plan: LaunchPlan) -> int:
        self.seen.append(plan.config)
        self.environments.append(launching.os.environ.get("LEFT_BY_A_RUN"))
        launching.os.environ["LEFT_BY_A_RUN"] = "1"
        end = self.ends[len(self.seen) - 1]
        if isinstance(end, Exception):
            raise end
        return end


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setitem(launching.LAUNCHERS, LauncherName.local, Recorder)
    monkeypatch.setattr(Recorder, "seen", [])
    monkeypatch.setattr(Recorder, "environments", [])
    return Recorder


def test_runs_start_in_turn_whatever_becomes_of_one(
    capsys: pytest.CaptureFixture[str], recorder: type[Recorder]
) -> None:
    recorder.ends = [0, 137, DataError("corpus.txt is empty"), 0]
    assert main(["pretrain_gpt", CPU, "train.run_dir=x", "train.seed=range(1,5)"]) == 137
    captured = capsys.readouterr()
    assert [config.train.seed for config in recorder.seen] == [1, 2, 3, 4]
    assert [config.train.run_dir for config in recorder.seen] == [f"x-seed_{seed}" for seed in (1, 2, 3, 4)]
    assert recorder.environments == [None] * 4, "a run's variables reached the next"
    assert captured.err == "error: corpus.txt is empty\n"
    assert captured.out.splitlines()[2:4] == [
        "run 2 of 4: train.seed=2",
        "pretrain_gpt: gpt_tiny on 1 process (cpu); run folder x-seed_2",
    ]
    assert captured.out.splitlines()[-5:] == [
        "run           exit code  run folder",
        "train.seed=1  0          x-seed_1",
        "train.seed=2  137        x-seed_2",
        "train.seed=3  2          x-seed_3",
        "train.seed=4  0          x-seed_4",
    ]


@pytest.mark.parametrize("code", [130, 143, 75])
def test_request_to_end_is_for_the_whole_sweep(
    capsys: pytest.CaptureFixture[str], recorder: type[Recorder], code: int
) -> None:
    recorder.ends = [0, code]
    assert main(["pretrain_gpt", CPU, "train.run_dir=x", "train.seed=1,2,3"]) == code
    assert capsys.readouterr().out.splitlines()[-1] == "train.seed=3  not started  x-seed_3"


def test_entry_scripts_refuse_a_sweep() -> None:
    """Each rank would have to run all of it."""
    with pytest.raises(ConfigError, match=r"train\.seed=1,2 names several values for one run"):
        compose("pretrain_gpt", ["train.seed=1,2"])


def test_table_is_as_wide_as_its_cells() -> None:
    points = [Point((), (("a", "1"),)), Point((), (("a", "1000"),))]
    assert table(points, [("x", "y"), ("xxxxxx", "y")], ("one", "two")) == (
        "run     one     two\na=1     x       y\na=1000  xxxxxx  y"
    )
