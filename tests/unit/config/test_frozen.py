"""The frozen configuration: same content, same name; whole or absent; refused where it does not belong."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from megatron_lite.config import frozen
from megatron_lite.config.changes import Grade
from megatron_lite.config.compose import change, compose
from megatron_lite.config.derived import fill_in
from megatron_lite.config.frozen import as_containers, check_run_folder, freeze, from_containers, load_frozen
from megatron_lite.config.hf.folder import STATE_FILE
from megatron_lite.config.preset_folders import PresetFolders
from megatron_lite.config.schema import RunConfig
from megatron_lite.errors import ConfigError


def config_of(*words: str) -> RunConfig:
    return fill_in(compose("pretrain_gpt", list(words)), device="cpu")


def trained(folder: Path, config: RunConfig) -> None:
    """A folder as a run leaves it after its first step."""
    freeze(config, folder)
    (folder / "metrics.jsonl").write_text("{}\n")


def test_file_is_named_by_its_content(tmp_path: Path) -> None:
    path = freeze(config_of("experiment=demo"), tmp_path / "run")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path == tmp_path / "run" / f"config-{digest[:12]}.yaml"
    assert freeze(config_of("experiment=demo"), tmp_path / "run") == path
    assert freeze(config_of("experiment=demo", "train.seed=1"), tmp_path / "run") != path
    assert [entry.name for entry in (tmp_path / "run").iterdir() if not entry.name.startswith("config-")] == []


def test_same_settings_by_other_words_have_the_same_name() -> None:
    by_name = config_of("parallel=dp2_tp2_pp2")
    by_number = config_of("parallel.data_parallel_size=2", "parallel.tensor_parallel_size=2",
                          "parallel.pipeline_parallel_size=2")  # fmt: skip
    assert frozen.render(by_name) == frozen.render(by_number)


def test_group_of_a_later_version_may_be_missing(tmp_path: Path) -> None:
    """A run that was frozen before there were objectives trained on next-token prediction, and goes on with it."""
    config = config_of("experiment=demo")
    text = OmegaConf.to_container(OmegaConf.load(freeze(config, tmp_path)))
    assert isinstance(text, dict)
    del text["objective"]
    earlier = tmp_path / "earlier.yaml"
    OmegaConf.save(OmegaConf.create(text), earlier)
    assert load_frozen(earlier) == config


@pytest.mark.parametrize("experiment", PresetFolders().groups()["experiment"])
def test_round_trip(tmp_path: Path, experiment: str) -> None:
    config = config_of(
        f"experiment={experiment}",
        "data.source=[a.txt,b/c.jsonl]",
        "data.weights=[0.25,0.75]",
        "train.generate_prompt='def f(x):\n    # 1e-4: yes'",
        "optimizer.epsilon=1e-8",
    )
    assert load_frozen(freeze(config, tmp_path)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  hiden_size: 3\n", "Key 'hiden_size' not in 'ModelConfig'"),
        ("train:\n  steps: many\n", "Value 'many' of type 'str' could not be converted to Integer"),
        ("a: [", "while parsing"),
        ("\x00\x01", "special characters are not allowed"),
        ("a: &a [x]\nb: *a\n", "it holds aliases"),
        (600 * "[" + 600 * "]", "RecursionError"),
        ("- 1\n", "Cannot merge DictConfig with ListConfig"),
        ("", "script, model, parallel, data, optimizer, train, stability, tracking, launcher, debug missing"),
    ],
)
def test_load_is_strict(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_frozen(path)
    assert str(caught.value).startswith(f"--config {path} is not a frozen configuration: ")
    assert message in str(caught.value)


def test_load_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file or directory; give a config-\*\.yaml"):
        load_frozen(tmp_path / "none.yaml")


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"train\.run_dir=.* cannot be written .*No space left on device"):
        freeze(config_of(), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_folder_of_the_same_run_is_taken_again(tmp_path: Path) -> None:
    config = config_of("train.steps=100")
    check_run_folder(config, tmp_path / "new")
    trained(tmp_path, config)
    check_run_folder(config, tmp_path)
    for word in (
        "train.steps=500",
        "train.save_interval=7",
        "tracking=wandb",
        "launcher=deepspeed",
        "data.num_workers=1",
        "debug=true",
        "train.run_dir=elsewhere",
    ):
        check_run_folder(config_of("train.steps=100", word), tmp_path)


def test_folder_of_another_run_is_refused_with_all_reasons(tmp_path: Path) -> None:
    trained(tmp_path, config_of())
    name = next(tmp_path.glob("config-*.yaml")).name
    words = ["model.num_layers=3", "optimizer.learning_rate=1e-3", "train.seed=7", "train.run_dir=elsewhere"]
    where = f"the run in train.run_dir={tmp_path} ({name})"

    def refused() -> list[str]:
        with pytest.raises(ConfigError) as caught:
            check_run_folder(config_of(*words), tmp_path)
        return caught.value.problems

    layers = (
        f"model.num_layers=3 cannot continue from 4 of {where}: the weights have the shapes of the earlier value; keep "
        "model.num_layers=4, or begin another run in a new train.run_dir"
    )
    seed = (
        f"train.seed=7 cannot continue from 1234 of {where}: it determines the order of the data, and so which samples "
        "are left to train on; keep train.seed=1234, or begin another run in a new train.run_dir"
    )
    assert refused() == [layers, seed]
    for step in (100, 200):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    assert refused() == [layers, f"{seed} with model.init_from={tmp_path}/checkpoints/step_00000200"]


def test_what_changes_within_a_run_is_told(tmp_path: Path) -> None:
    assert check_run_folder(config_of(), tmp_path) == []
    trained(tmp_path, config_of())
    changes = check_run_folder(config_of("optimizer.learning_rate=1e-3", "parallel=dp2"), tmp_path)
    assert [(change.key, change.grade) for change in changes if not change.key.startswith("launcher.")] == [
        ("parallel.data_parallel_size", Grade.safe),
        ("optimizer.learning_rate", Grade.resets),
    ]


def test_folder_with_a_checkpoint_counts_as_trained(tmp_path: Path) -> None:
    freeze(config_of(), tmp_path)
    (tmp_path / "checkpoints" / "step-10").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"model\.num_layers"):
        check_run_folder(config_of("model.num_layers=3"), tmp_path)


def test_folder_that_never_trained_is_free(tmp_path: Path) -> None:
    """A first attempt that failed on its data must not forbid the corrected second one."""
    freeze(config_of(), tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    check_run_folder(config_of("model.num_layers=3"), tmp_path)


def test_the_configuration_that_ran_last_counts(tmp_path: Path) -> None:
    first, second = config_of(), config_of("model.num_layers=3")
    for config in (first, second, first):  # `first` is frozen again after `second`, which never trained
        freeze(config, tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    check_run_folder(first, tmp_path)
    with pytest.raises(ConfigError, match=r"model\.num_layers"):
        check_run_folder(second, tmp_path)


def test_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=rf"run_dir={tmp_path}/file/run cannot be a folder: {tmp_path}/file is a file"
    ):
        check_run_folder(config_of(), tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to give up root to lose permissions")
def test_run_folder_without_permission_as_root(tmp_path: Path) -> None:
    """Root may write everywhere, so the check runs in a child that is nobody."""
    tmp_path.chmod(0o755)
    for parent in list(tmp_path.parents)[:3]:
        parent.chmod(0o755)
    config, pid = config_of(), os.fork()
    if pid == 0:
        os.setuid(65534)
        try:
            check_run_folder(config, tmp_path / "run")
        except ConfigError as error:
            expected = f"train.run_dir={tmp_path / 'run'} cannot be written ({tmp_path}: Permission denied); give a"
            os._exit(0 if str(error).startswith(expected) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_run_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(ConfigError, match=r"cannot be written .*Permission denied"):
        check_run_folder(config_of(), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"cannot be written .*Permission denied"):
        freeze(replace(config_of()), tmp_path / "run")


def test_folder_of_a_version_that_this_one_cannot_read(tmp_path: Path) -> None:
    config = fill_in(compose("pretrain_gpt", [f"train.run_dir={tmp_path}"]))
    path = freeze(config, tmp_path)
    later = path.read_text().replace("    minimum: 1\n", "    minimum: 1.5\n")
    path.unlink()
    (tmp_path / f"config-{hashlib.sha256(later.encode()).hexdigest()[:12]}.yaml").write_text(later)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=rf"train\.run_dir={tmp_path} holds a run .* give another train\.run_dir"):
        check_run_folder(config, tmp_path)


def test_containers_of_json_give_the_same_configuration() -> None:
    """What a checkpoint keeps of its configuration."""
    config = config_of("experiment=llama_7b", "data.source=[a.txt,b.txt]", "data.weights=[1,2]")
    config = replace(config, launcher=replace(config.launcher, setup=["export A=${HOME}/x"], environment={"A": "${B}"}))
    content = json.loads(json.dumps(as_containers(config)))
    assert from_containers(content) == config
    del content["objective"], content["train"]["async_save"]  # of a version that did not have them yet
    assert from_containers(content) == config
    content["train"]["flavour"] = 1
    with pytest.raises(ConfigError, match=r"this version cannot read the configuration: .*Key 'flavour' not in"):
        from_containers(content)


def test_shell_text_stays_as_it_is(tmp_path: Path) -> None:
    """OmegaConf would take `${...}` for a reference, here and when the file is loaded."""
    lines = ["export A=${HOME}/x", r"echo \${B} \\${C}", "x=$(date) `id`", "a: b # c\n'\"d"]
    config = fill_in(compose("pretrain_gpt", []), device="cpu")
    config = replace(config, launcher=replace(config.launcher, setup=lines, environment={"A": "${B:-c}"}))
    assert load_frozen(freeze(config, tmp_path)) == config
    assert change(config, ["train.steps=7"]) == replace(config, train=replace(config.train, steps=7))


def saved(folder: Path, config: RunConfig, step: int = 10) -> None:
    """What a checkpoint keeps of its configuration: no variables of the environment."""
    path = folder / "checkpoints" / f"step_{step:08d}" / STATE_FILE
    path.parent.mkdir(parents=True)
    kept = replace(config, launcher=replace(config.launcher, environment={}))
    path.write_text(json.dumps({"step": step, "config": as_containers(kept)}))


@pytest.mark.parametrize("environment", [{}, {"A": "${B} x", "NCCL_DEBUG": "INFO"}])
def test_a_damaged_configuration_is_restored_from_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], environment: dict[str, str]
) -> None:
    config = config_of(f"train.run_dir={tmp_path}")
    config = replace(config, launcher=replace(config.launcher, environment=environment))
    path = freeze(config, tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    saved(tmp_path, config)
    os.utime(path, ns=(1, 1))
    whole = path.read_bytes()
    place = whole.index(b"num_layers")
    damages = [b"", b"\0" * len(whole), whole[:100]] if not environment else []
    for damaged in [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], *damages]:
        path.write_bytes(damaged)
        os.utime(path, ns=(1, 1))
        assert load_frozen(path) == config
        assert (
            f"warning: {path} is damaged: its content is not what the hash in its name tells" in capsys.readouterr().err
        )
        assert path.read_bytes() == whole
        assert path.stat().st_mtime_ns == 1, "which tells what the folder last ran with"
        check_run_folder(config, tmp_path)
        assert capsys.readouterr().err == ""


def test_a_damaged_configuration_without_a_copy_is_named_and_the_same_words_write_it_anew(tmp_path: Path) -> None:
    config = config_of("train.steps=100")
    trained(tmp_path, config)
    path = next(tmp_path.glob("config-*.yaml"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    message = rf"{path} is damaged: its content is not what the hash in its name tells, and no checkpoint"
    with pytest.raises(ConfigError, match=message):
        load_frozen(path)
    with pytest.raises(ConfigError, match=rf"train\.run_dir={tmp_path}: {message}"):
        check_run_folder(config_of("train.steps=200"), tmp_path)
    check_run_folder(config, tmp_path)  # the remedies, each obeyed
    freeze(config, tmp_path)
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b"steps: 100", b"steps: 101"))
    edited = path.rename(tmp_path / "edited.yaml")
    assert load_frozen(edited) == config_of("train.steps=101")


def test_files_follow_the_umask(tmp_path: Path) -> None:
    for umask, mode in ((0o077, 0o600), (0o022, 0o644)):
        before = os.umask(umask)
        try:
            assert freeze(config_of(), tmp_path).stat().st_mode & 0o777 == mode
        finally:
            os.umask(before)
