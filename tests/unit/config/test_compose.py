"""Composition: words become typed values, and wrong words become one error that says what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lite.config import preset_folders
from megatron_lite.config.compose import compose
from megatron_lite.config.keys import ALIASES, leaf_keys, nearest, schema_keys
from megatron_lite.config.preset_folders import SHIPPED, PresetFolders, find_folders
from megatron_lite.config.presets import check_preset
from megatron_lite.config.schema import Decay, Precision
from megatron_lite.errors import ConfigError


def problems_of(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose("pretrain_gpt", list(words))
    return caught.value.problems


def test_presets_and_values_become_typed_fields() -> None:
    config = compose(
        "pretrain_gpt", ["model=llama_7b", "optimizer.learning_rate=1e-4", "train.precision=bf16", "train.steps=1e3"]
    )
    assert config.script == "pretrain_gpt"
    assert config.model.ffn_hidden_size == 11008
    assert config.model.norm_epsilon == 1e-6
    assert config.optimizer.learning_rate == 1e-4
    assert config.train.precision is Precision.bf16
    assert config.train.steps == 1000
    assert isinstance(config.train.steps, int)


def test_command_line_wins_over_experiment_wins_over_presets() -> None:
    config = compose("pretrain_gpt", ["experiment=demo", "optimizer.warmup_steps=7", "model=llama_tiny"])
    assert config.parallel.pipeline_parallel_size == 2  # the experiment's preset
    assert config.optimizer.learning_rate == 3e-3  # the experiment's value over its preset's
    assert config.optimizer.warmup_steps == 7
    assert config.model.name == "llama_tiny"


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("dp3_tp1_pp2", (3, 1, 2)),
        ("tp4", (1, 4, 1)),
        ("dp2_pp2", (2, 1, 2)),
        ("dp16_tp8_pp8", (16, 8, 8)),
        ("single", (1, 1, 1)),
    ],
)
def test_any_layout_has_a_name(name: str, sizes: tuple[int, int, int]) -> None:
    parallel = compose("pretrain_gpt", [f"parallel={name}"]).parallel
    assert (parallel.data_parallel_size, parallel.tensor_parallel_size, parallel.pipeline_parallel_size) == sizes


def test_lists_nulls_texts_groups_and_interpolations() -> None:
    config = compose(
        "pretrain_gpt",
        [
            "data.source=[a.txt,b.jsonl]",
            "data.weights=[1,2.5]",
            "parallel.data_parallel_size=null",
            "train.generate_prompt='x = f('",
            "train.batch_ramp={start:4,increment:4,samples:1e2}",
            "tracking.wandb_name=${model.name}",
            "optimizer.decay=linear",
            "++train.seed=5",
        ],
    )
    assert config.data.source == ["a.txt", "b.jsonl"]
    assert config.data.weights == [1.0, 2.5]
    assert config.parallel.data_parallel_size is None
    assert config.train.generate_prompt == "x = f("
    assert config.train.batch_ramp.samples == 100
    assert config.tracking.wandb_name == "gpt_tiny"
    assert config.optimizer.decay is Decay.linear
    assert config.train.seed == 5


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("model.hiden_size=3", "model.hidden_size"),
        ("hidden_size=3", "model.hidden_size"),
        ("train.hidden_size=3", "model.hidden_size"),
        ("trian.steps=3", "train.steps"),
        ("train.batch_ramp.star=3", "train.batch_ramp.start"),
        ("lr=3", "optimizer.learning_rate"),
        ("parallel.tp=2", "parallel.tensor_parallel_size"),
        ("modle=gpt_tiny", "model"),
        ("mlm_probability=0.2", "objective.masked_fraction"),
        ("objective.masked_lm_prob=0.2", "objective.masked_fraction"),
        ("short_seq_prob=0.2", "objective.short_fraction"),
        ("noise_density=0.2", "objective.noise_density"),
        ("data.mean_noise_span_length=3", "objective.mean_span_length"),
        ("fim_rate=0.9", "objective.fim_fraction"),
        ("poisson_lambda=2", "objective.infill_span_length"),
        ("num_decoder_layers=2", "model.num_decoder_layers"),
        ("model.type_vocab_size=2", "model.num_segments"),
        ("objective.masked_fration=0.2", "objective.masked_fraction"),
        ("train.batch_ramp={star:3}", "train.batch_ramp.start"),
    ],
)
def test_unknown_key_names_the_nearest(word: str, meant: str) -> None:
    key = "train.batch_ramp.star" if "{" in word else word.partition("=")[0]
    assert problems_of(word) == [f"{key} is not a setting; did you mean {meant}?"]


def test_aliases_name_settings() -> None:
    assert set(ALIASES.values()) <= set(leaf_keys())
    assert not set(ALIASES) & set(schema_keys())


FAMILIES = ["gpt2", "llama", "bert", "roberta", "t5", "bart"]


@pytest.mark.parametrize(
    "word", ["camembert", "opt", "albert", "mbart", "mt5", "umt5", "distilbert", "bloom", "gptj", "xlm"]
)
def test_another_thing_with_like_letters_is_no_slip(word: str) -> None:
    assert nearest(word, FAMILIES) is None


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("lama", "llama"),
        ("robreta", "roberta"),
        ("gpt_tinny", "gpt_tiny"),
        ("--dryrun", "--dry-run"),
        ("wikitxt103", "wikitext103"),
    ],
)
def test_slips(word: str, meant: str) -> None:
    assert nearest(word, [*FAMILIES, "gpt_tiny", "--dry-run", "--debug", "wikitext103"]) == meant


def test_key_like_nothing_gets_no_guess() -> None:
    assert problems_of("zzzzzz=3") == ["zzzzzz is not a setting; `python -m launch explain` lists all of them"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.steps=abc", "train.steps=abc is not possible: train.steps must be an integer"),
        ("train.steps=1.5", "train.steps=1.5 is not possible: train.steps must be an integer"),
        ("train.steps=true", "train.steps=true is not possible: train.steps must be an integer"),
        ("train.seed=null", "train.seed=null is not possible: train.seed must be an integer"),
        ("model.vocab_size=x", "model.vocab_size=x is not possible: model.vocab_size must be an integer or null"),
        (
            "optimizer.decay=cos",
            f"optimizer.decay=cos is not possible: optimizer.decay must be one of {', '.join(Decay)}",
        ),
        ("data.weights=[a]", "data.weights=[a] is not possible: data.weights must be a list of numbers or null"),
        (
            "optimizer.learning_rate=fast",
            "optimizer.learning_rate=fast is not possible: optimizer.learning_rate must be a number",
        ),
        (
            "objective.ul2_weights=[a]",
            "objective.ul2_weights=[a] is not possible: objective.ul2_weights must be a list of numbers",
        ),
        (
            "objective.name=mlm",
            "objective.name=mlm is not possible: objective.name must be one of causal_lm, prefix_lm, "
            "fill_in_the_middle, masked_lm, masked_lm_nsp, span_corruption, bart_denoising, ul2",
        ),
        ("tracking.plot=perhaps", "tracking.plot=perhaps is not possible: tracking.plot must be true or false"),
        (
            "train.loss_scale=3",
            "train.loss_scale=3 is not possible: train.loss_scale is a group of settings; "
            "set single values as train.loss_scale.KEY=VALUE",
        ),
        ("train.micro_batch_size=1,2", "train.micro_batch_size=1,2 names several values for one run; start one run for "
         "each value"),
        ("~model.name", "~model.name would remove a setting, which is not possible; set it to a value or to null"),
        ("--foo=3", "--foo=3 is not an option; settings are written key=value, without dashes"),
        ("train.steps", "'train.steps' has no value; settings are written key=value, such as train.steps=VALUE"),
        ("hydra.run.dir=x", "hydra.run.dir is not a setting; Hydra only composes here. The run folder is "
         "train.run_dir"),
        ("model={hidden_size:3}", "model={...} names no preset; set single values as model.KEY=VALUE"),
        (
            "train.steps=[",
            "train.steps=[ cannot be read: HydraException: no viable alternative at input '['; write "
            "train.steps=VALUE with an integer",
        ),
        (
            "train.run_dir=${no.such}",
            "train.run_dir: Interpolation key 'no.such' not found; ${...} names another setting, such as "
            "${model.name}; for the characters themselves write \\${...}",
        ),
    ],
)  # fmt: skip
def test_wrong_words(word: str, message: str) -> None:
    assert problems_of(word) == [message]


def test_unknown_preset_lists_the_choices() -> None:
    (problem,) = problems_of("model=gpt_tinny")
    options = ", ".join(PresetFolders().groups()["model"])
    assert problem == f"model=gpt_tinny is not a preset; did you mean gpt_tiny? (choose one of {options})"


def test_unknown_script_lists_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"^'pretrain_gtp' is not a script; did you mean pretrain_gpt\?"):
        compose("pretrain_gtp", [])


def test_all_wrong_words_are_reported_at_once() -> None:
    found = problems_of("model.hiden_size=3", "train.steps=abc", "model=none", "train.micro_batch_size=2", "lr=1")
    assert [problem.split(" ")[0] for problem in found] == ["model.hiden_size", "train.steps=abc", "model=none", "lr"]


@pytest.fixture
def own_conf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The `conf/` of a user, in the current folder."""
    for group in ("model", "data", "experiment"):
        (tmp_path / "conf" / group).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "conf"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hiden_size: 3", "conf/model/mine.yaml: model.hiden_size is not a setting; did you mean model.hidden_size?"),
        ("num_layers: many", "conf/model/mine.yaml: model.num_layers must be an integer: Value 'many' of type 'str' "
         "could not be converted to Integer"),
    ],
)  # fmt: skip
def test_mistake_in_a_preset_names_its_file(own_conf: Path, text: str, message: str) -> None:
    (own_conf / "model" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose("pretrain_gpt", ["model=mine"])
    assert caught.value.problems == [message]


def test_preset_that_is_not_yaml(own_conf: Path) -> None:
    (own_conf / "model" / "mine.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="conf/"):
        compose("pretrain_gpt", ["model=mine"])


def test_composition_does_not_depend_on_the_folder_it_runs_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = compose("pretrain_gpt", ["experiment=demo"])
    monkeypatch.chdir(tmp_path)
    assert compose("pretrain_gpt", ["experiment=demo"]) == expected
    assert list(tmp_path.iterdir()) == []


def test_missing_presets_are_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(preset_folders, "SHIPPED", tmp_path / "none")
    with pytest.raises(ConfigError, match=r"is missing; install megatron_lite again"):
        compose("pretrain_gpt", [])


def test_presets_of_the_user_are_added_to_ours(own_conf: Path) -> None:
    (own_conf / "model" / "mine.yaml").write_text("name: mine\nhidden_size: 96")
    (own_conf / "experiment" / "both.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: mine\n  - override /optimizer: sgd\ntrain:\n  steps: 7"
    )
    config = compose("pretrain_gpt", ["experiment=both"])
    assert (config.model.name, config.model.hidden_size, config.optimizer.name, config.train.steps) == (
        "mine",
        96,
        "sgd",
        7,
    )
    assert compose("pretrain_gpt", ["model=gpt2_124m"]).model.hidden_size == 768


def test_a_preset_of_the_user_stands_for_ours_of_the_same_name(own_conf: Path) -> None:
    (own_conf / "model" / "gpt_tiny.yaml").write_text("hidden_size: 96")
    assert compose("pretrain_gpt", []).model.hidden_size == 96
    assert compose("pretrain_gpt", [], PresetFolders()).model.hidden_size == 128


def test_a_script_may_start_from_what_the_user_says(own_conf: Path) -> None:
    (own_conf / "pretrain_gpt.yaml").write_text("defaults: [megatron_lite_schema, _self_]\ntrain: {steps: 5}")
    assert compose("pretrain_gpt", []).train.steps == 5


@pytest.mark.parametrize("name", ["with space", "a=b,c", "${HOME}", 'it\'s "q"', "é\\n", "[x]", "#1"])
def test_folder_of_presets_may_have_any_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    (tmp_path / name / "model").mkdir(parents=True)
    (tmp_path / name / "model" / "mine.yaml").write_text("hidden_size: 96")
    monkeypatch.chdir(tmp_path)
    assert compose("pretrain_gpt", ["model=mine"], find_folders(Path(name))).model.hidden_size == 96


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "--conf own is not a folder (looked from {here}); give one with presets"),
        (["own/README"], "--conf own holds no presets; put them into folders of groups, such as own/model/NAME.yaml"),
        (["own/models/a.yaml"], "--conf own: models is not a group of presets; did you mean model? (choose one of "
         "data, experiment, launcher, model, objective, optimizer, parallel, stability, tracking, train)"),
    ],
)  # fmt: skip
def test_folder_without_presets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in files:
        Path(file).parent.mkdir(parents=True)
        Path(file).touch()
    with pytest.raises(ConfigError) as caught:
        find_folders(Path("own"))
    assert caught.value.problems == [message.format(here=tmp_path)]


def test_what_is_not_a_file_is_not_a_preset(own_conf: Path) -> None:
    (own_conf / "model" / "folder.yaml").mkdir()
    (own_conf / "model" / "dangling.yaml").symlink_to("nowhere")
    (own_conf / "model" / "mine.yaml").write_text("hidden_size: 96")
    assert set(find_folders().groups()["model"]) - set(PresetFolders().groups()["model"]) == {"mine"}
    assert problems_of("model=folder")[0].startswith("model=folder is not a preset; choose one of ")


def test_conf_of_another_program_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "conf" / "db").mkdir(parents=True)
    for name in ("config", "megatron_lite_schema", "db/model"):
        (tmp_path / "conf" / f"{name}.yaml").write_text("a: 1")
    monkeypatch.chdir(tmp_path)
    assert find_folders() == PresetFolders()
    assert compose("pretrain_gpt", []).model.name == "gpt_tiny"


def test_map_as_a_whole_and_by_name() -> None:
    words = ["launcher.environment={A: b, N: 3}", "launcher.environment.C='d \"e\" $(id)'"]
    assert compose("pretrain_gpt", words).launcher.environment == {"A": "b", "N": "3", "C": 'd "e" $(id)'}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("launcher.environment=[1]", "launcher.environment=[1] is not possible: launcher.environment must be a map of "
         "names to texts, such as {NAME: value}"),
        ("launcher.environment.A=[1]", "launcher.environment.A=[1] is not possible: launcher.environment.A must be a "
         "text; for the text itself write 'launcher.environment.A=\"[1]\"'"),
        ("launcher.environment={A: null}", "launcher.environment={A: null} is not possible: launcher.environment must "
         "be a map of names to texts, such as {NAME: value}"),
    ],
)  # fmt: skip
def test_what_a_map_cannot_be(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("pretrain_gpt", [word])
    assert caught.value.problems == [message]


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("dataset_config: 1.10", "data.dataset_config", "1.10"),
        ("dataset_config: 12e5", "data.dataset_config", "12e5"),
        ("dataset_config: 2020-01-01", "data.dataset_config", "2020-01-01"),
        ("text_key: yes", "data.text_key", "yes"),
        ("source: [a.txt, 007]", "data.source", "007"),
        ("# @package _global_\nlauncher:\n  time: 24:00:00", "launcher.time", "24:00:00"),
        ("# @package _global_\nlauncher:\n  environment:\n    A: 0x10", "launcher.environment.A", "0x10"),
    ],
)
def test_text_of_a_preset_that_yaml_would_change(own_conf: Path, text: str, key: str, value: str) -> None:
    file = own_conf / "data" / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        compose("pretrain_gpt", ["data=mine"])
    assert caught.value.problems == [
        f"conf/data/mine.yaml: {key}: {value} is read by YAML as something else than this text; quote it: '{value}'"
    ]
    file.write_text(text.replace(value, f"'{value}'"))
    compose("pretrain_gpt", ["data=mine"])


def test_aliases_of_a_preset(own_conf: Path) -> None:
    """Nine levels of nine aliases would take all memory."""
    levels = [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    (own_conf / "data" / "mine.yaml").write_text("\n".join(["a0: &a0 [x]", *levels]))
    with pytest.raises(ConfigError, match=r"conf/data/mine\.yaml has aliases"):
        compose("pretrain_gpt", ["data=mine"])


@pytest.mark.parametrize("group", PresetFolders().groups())
def test_presets_hold_no_text_that_yaml_would_change(group: str) -> None:
    for name in PresetFolders().groups()[group]:
        check_preset(SHIPPED / group / f"{name}.yaml", group)
