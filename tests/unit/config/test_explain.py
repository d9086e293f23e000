"""`explain`: every setting has a meaning, and what is told of it is what the tables say."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lite.config.changes import Grade, on_resume
from megatron_lite.config.compose import compose
from megatron_lite.config.explain import explain
from megatron_lite.config.facts import facts, facts_of, ranges_of_numbers, rules_of_texts
from megatron_lite.config.field_docs import field_docs
from megatron_lite.config.keys import as_word, expects, get_value, leaf_keys, schema_keys
from megatron_lite.config.overrides import read
from megatron_lite.config.preset_folders import PresetFolders
from megatron_lite.config.setting import SAFE, Forbidden, Resets
from megatron_lite.errors import ConfigError

OURS = PresetFolders()


@pytest.mark.parametrize("key", list(schema_keys()))
def test_every_setting_has_a_docstring(key: str) -> None:
    """Below its field in the schema: what `explain` prints."""
    text = field_docs().get(key, "")
    assert text
    assert not text.startswith(f"{schema_keys()[key]}"), "the signature that dataclasses give themselves"
    assert "(name:" not in text


@pytest.mark.parametrize("key", leaf_keys())
def test_a_setting_is_explained(key: str) -> None:
    found = dict(explain(key, OURS))
    assert found[key] == field_docs()[key]
    assert found["type"] == expects(key)
    assert ("range" in found) == (key in ranges_of_numbers())
    assert ("rule" in found) == (key in rules_of_texts())
    assert not {"rule", "range"} & {label for label, text in found.items() if not text}
    grade = Grade(found["on resume"].partition(":")[0])
    effect = facts_of(key).resume
    is_forbidden = isinstance(effect, Forbidden)
    assert grade is (Grade.safe if effect is SAFE else Grade.forbidden if is_forbidden else Grade.resets)
    assert found["on resume"].partition(": ")[2], "says what follows"


def test_consequences_describe_themselves() -> None:
    resets = {key: found.resume for key, found in facts().items() if isinstance(found.resume, Resets)}
    assert resets
    for key, reset in resets.items():
        assert on_resume(key) == (Grade.resets, reset.consequence.__doc__)
        assert reset.consequence.__doc__


@pytest.mark.parametrize("key", ["optimizer.decay", "parallel.zero_stage", "data.seq_length"])
def test_presets_that_set_a_key_set_it_to_that(key: str) -> None:
    found = {label.removeprefix("preset "): value for label, value in explain(key, OURS) if label.startswith("preset ")}
    assert found
    for preset, value in found.items():
        group, _, name = preset.partition("/")
        script = "pretrain_bert" if "bert" in name else "pretrain_gpt"
        config = compose(script, [f"{group}={name}"])
        assert [(key, get_value(config, key))] == read(f"{key}={value}"), preset


def test_choices_have_the_comments_of_the_schema() -> None:
    found = dict(explain("model.norm_placement", OURS))
    assert found["  post"] == "of each sum with the residual: BERT, RoBERTa, BART"
    decays = dict(explain("optimizer.decay", OURS))
    assert decays["  linear"] == "a straight line to min_learning_rate (arXiv 1810.04805)"
    assert "  adamw" not in dict(explain("optimizer.name", OURS)), "which have none, and stand in the type"


def test_groups_list_their_settings_and_presets() -> None:
    found = dict(explain("optimizer", OURS))
    assert {key for key in found if "." in key} == {key for key in leaf_keys() if key.startswith("optimizer.")}
    assert {key for key in found if "=" in key} == {f"optimizer={name}" for name in OURS.groups()["optimizer"]}
    assert {"model", "experiment", "debug"} <= set(dict(explain("", OURS)))
    assert "experiment=demo" in dict(explain("experiment", OURS))
    assert "train.batch_ramp.start" in dict(explain("train.batch_ramp", OURS))


def test_a_preset_is_shown(tmp_path: Path) -> None:
    found = dict(explain("experiment=demo", OURS))
    assert found["file"] == "megatron_lite/conf/experiment/demo.yaml"
    assert (found["parallel"], found["optimizer.learning_rate"]) == ("dp2_tp2_pp2", "3e-3")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "gpt_tiny.yaml").write_text("# Mine.\nhidden_size: 96")
    own = PresetFolders(tmp_path)
    assert explain("model/gpt_tiny", own) == [
        ("model=gpt_tiny", "Mine."), ("file", f"{tmp_path}/model/gpt_tiny.yaml"), ("model.hidden_size", "96"),
    ]  # fmt: skip
    assert ("preset model/gpt_tiny", "96") in explain("model.hidden_size", own)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optimizer.lerning_rate", "optimizer.lerning_rate is not a setting; did you mean optimizer.learning_rate?"),
        ("optimzer", "optimzer is not a setting; did you mean optimizer?"),
        ("lr", "lr is not a setting; did you mean optimizer.learning_rate?"),
        ("zzzzzz", "zzzzzz is not a setting; `python -m launch explain` lists all of them"),
    ],
)
def test_what_there_is_not(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        explain(name, OURS)
    assert caught.value.problems == [message]


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe", b"- 1\n- 2", b"", b"*a", b"model: {a: 1}\n--- 2"])
def test_damaged_preset_of_the_user(tmp_path: Path, content: bytes) -> None:
    """Of what is asked, an answer or one error that names the file."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_bytes(content)
    for name in ("model", "model=mine", "model.hidden_size"):
        message = f"{tmp_path}/model/mine.yaml "
        try:
            assert explain(name, PresetFolders(tmp_path))
        except ConfigError as error:
            message = str(error)
        assert message.startswith(f"{tmp_path}/model/mine.yaml ")


def test_an_entry_of_a_map_is_explained_as_the_map() -> None:
    assert explain("launcher.environment.NCCL_DEBUG", OURS) == explain("launcher.environment", OURS)
    assert as_word(None) == dict(explain("model.head_size", OURS))["default"]
