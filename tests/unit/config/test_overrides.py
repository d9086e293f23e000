"""A text reaches its setting as it was typed, through the command line, the frozen file and back, or is refused."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from launch import sweep
from megatron_lite.config import overrides
from megatron_lite.config.compose import change, compose
from megatron_lite.config.frozen import as_containers, freeze, from_containers, load_frozen
from megatron_lite.config.keys import Shape, get_value, leaf_keys, may_be_null, text_shape
from megatron_lite.config.schema import RunConfig
from megatron_lite.config.texts import free
from megatron_lite.errors import ConfigError

SINGLE = [
    key for key in leaf_keys() if text_shape(key) in (Shape.text, Shape.text_or_texts) and key != "model.init_from"
]
LISTS = [key for key in leaf_keys() if text_shape(key) in (Shape.texts, Shape.text_or_texts)]
LOOKALIKES = [
    "1.10", "12e5", "0x10", "1_000", "true", "yes", "on", "off", "No", "~", "007", "0o17", "0b11", "2020-01-01", "1:30",
    "2020-01-01 00:00:00", "1e-4", "+5", "-0", ".5", "5.", "inf", ".inf", "nan", ".NaN", "NULL", "Null", "٣",
    "It's", 'say "hi"', "a=b", "a == b", " a ", "def ", "a b(", "f(x)", "a]", "b}", "$HOME", "$(id)", "`id`", "a\\b",
    "a\\", "\\\\", "C:\\new\\table", "a: b", "# a", "a # b", "- a", "&a", "*a", "!a", "!!int 5", "%a", "@a", "|", ">",
    "a\nb", "a\tb", "a\u2028b", "a\x85b", "a\x7fb", "\ufeffa", "日本語", "🙂", "str(3)", "int(3)", "a@b", "~a", "--a",
    "?", "\uff11\uff10",
    "....", "$", "${", "a${b", "1e400", 30 * "9", 5000 * "9",
]  # fmt: skip
TEXT = st.one_of(
    st.sampled_from(LOOKALIKES), st.text(max_size=20), st.text(alphabet="[]{}()'\",\\:=$ a1.\n", max_size=12)
)
BASE = compose("pretrain_gpt", [])


def given_back(config: RunConfig, folder: Path) -> RunConfig:
    """Through the frozen file, which must say the same as the JSON of a checkpoint."""
    assert from_containers(as_containers(config)) == config
    return load_frozen(freeze(config, folder))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXT, min_size=len(SINGLE), max_size=len(SINGLE)))
def test_a_text_is_kept_or_refused(texts: list[str], tmp_path: Path) -> None:
    kept = []
    for key, text in zip(SINGLE, texts, strict=True):
        try:
            ((_, value),) = overrides.read(f"{key}={text}")
        except ConfigError:
            assert text.strip()[:1] in tuple("[{'\"") or set(text) & set(",$\\?(") or text.strip() == "null", text
            continue
        if "${" in text or (key in overrides.ESCAPED and "\\" in text):
            continue  # have a meaning of their own
        if text.strip() == "null":
            assert value is None
        elif text.strip()[:1] in tuple("'\""):
            assert value in text  # what the quotes enclose
        else:
            assert value == text
        if free(text) is None:  # else a rule refuses it
            kept.append((key, text, value))
    config = change(BASE, [f"{key}={text}" for key, text, _ in kept])
    assert [get_value(config, key) for key, _, _ in kept] == [value for _, _, value in kept]
    assert given_back(config, tmp_path) == config


@settings(max_examples=100, deadline=None, derandomize=True)
@given(key=st.sampled_from(SINGLE), text=TEXT)
@example(key="tracking.wandb_name", text="null")
@example(key="tracking.wandb_name", text="\\")
def test_a_quoted_text_is_kept(key: str, text: str) -> None:
    """What every message about quoting advises, as the shell hands it on."""
    if text == "???" or "${" in text or key in overrides.ESCAPED:
        return
    (word,) = shlex.split(overrides.as_typed(key, text))
    assert overrides.read(word) == [(key, text)]


@pytest.mark.parametrize("key", LISTS)
def test_entries_of_lists_are_kept(key: str, tmp_path: Path) -> None:
    texts = [text for text in LOOKALIKES if "${" not in text and free(text) is None]
    config = change(BASE, [f"{key}=[a, {','.join(map(overrides.quoted, texts))},'b,]']"])
    assert get_value(config, key) == ["a", *texts, "b,]"]
    assert given_back(config, tmp_path) == config


def test_entries_of_lists_and_maps_need_no_quotes() -> None:
    config = compose("pretrain_gpt", ["data.source=[1.10, 12e5 ,007]", "launcher.environment={A: 1.10, B: yes,C:a:b}",
                                      "launcher.environment.D=0x10"])  # fmt: skip
    assert config.data.source == ["1.10", "12e5", "007"]
    assert config.launcher.environment == {"A": "1.10", "B": "yes", "C": "a:b", "D": "0x10"}


def test_all_texts_through_hydra() -> None:
    """`change` sets values as `compose` does; one real composition of every setting shows it."""
    texts = dict(zip(SINGLE, [text for text in LOOKALIKES if text.isalnum()], strict=False))
    config = compose("pretrain_gpt", [f"{key}={text}" for key, text in texts.items()])
    assert {key: get_value(config, key) for key in texts} == texts


@pytest.mark.parametrize("key", SINGLE)
def test_null(key: str) -> None:
    if may_be_null(key):
        assert overrides.read(f"{key}=null") == [(key, None)]
    else:
        with pytest.raises(ConfigError, match=r"for the text null write"):
            overrides.read(f"{key}=null")
    assert overrides.read(f"{key}='null'") == [(key, "null")]


@pytest.mark.parametrize(
    ("typed", "separator"),
    [
        (r"\n", "\n"), (r"\n\n", "\n\n"), (r"\t", "\t"), (r"\\n", "\\n"), (r"\u00e9", "é"), (r"\x41\U0001F642", "A🙂"),
        (r'"\n,\n"', "\n,\n"), ("\n", "\n"), ("---", "---"), ("null", None),
    ],
)  # fmt: skip
def test_escapes_in_separators(typed: str, separator: str | None, tmp_path: Path) -> None:
    config = compose("pretrain_gpt", [f"data.document_separator={typed}"])
    assert config.data.document_separator == separator
    assert given_back(config, tmp_path) == config


@pytest.mark.parametrize("typed", ["\\q", "\\", "\\u12", "\\ud800", "\\x4"])
def test_what_is_no_escape(typed: str) -> None:
    with pytest.raises(ConfigError, match=r"which is not an escape; use \\n, \\t, \\uXXXX, or \\\\ for a backslash"):
        compose("pretrain_gpt", [f"data.document_separator={typed}"])


def test_a_wrong_escape_is_named_whole() -> None:
    with pytest.raises(ConfigError, match=r"=a\\ud800 holds \\ud800, which"):
        compose("pretrain_gpt", [r"data.document_separator=a\ud800"])


@pytest.mark.parametrize("text", ["It's, well", "'tis", '"', "[a", "{a", "a,b", "choice(a)", "'a' b", "range(1,3)"])
def test_the_advice_on_quoting_works_in_a_shell(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("pretrain_gpt", [f"train.generate_prompt={text}"])
    (problem,) = caught.value.problems
    (word,) = shlex.split(problem.rpartition("write ")[2])
    assert compose("pretrain_gpt", [word]).train.generate_prompt == text


def test_sweeps_keep_what_was_typed() -> None:
    def values(word: str) -> list[str]:
        return [point.overrides[0].partition("=")[2] for point in sweep.expand([word])]

    assert values("data.dataset_config=1.10,12e5") == ["1.10", "12e5"]
    assert values("data.dataset_config=choice(1.10, yes)") == ["1.10", "yes"]
    assert values("data.source=[a,1.10],'b,c'") == ["[a,1.10]", "'b,c'"]
    assert values("train.generate_prompt='a,b'") == ["'a,b'"]
    assert values("data.dataset_config=range(1,3)") == ["1", "2"]
    assert values("train.seed=1,2") == ["1", "2"]
    assert values("data.eod_token=<|endoftext|>,</s>") == ["<|endoftext|>", "</s>"]
    assert values("data.eod_token=choice(<|endoftext|>)") == ["<|endoftext|>"]
    assert values("train.generate_prompt=It's,100% sure;") == ["It's", "100% sure;"]
    assert values("train.generate_prompt=Well, ") == ["Well, "]  # one run is refused, with how to write it


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.seed=range(0,3,0)"], "cannot be read"),
        (["train.seed=range(0,1000000000000)"], "more than 1000 runs"),
        (["train.seed=range(0)"], "holds no value"),
        (["tracking.wandb_name=range(3,1)"], "holds no value"),
        (["train.seed=range(0,100)", "train.steps=range(100,200)"], "more than 1000 runs"),
    ],
)
def test_sweeps_that_cannot_be_counted(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sweep.expand(words)


ODD = [
    "",
    "null",
    "[]",
    "[null]",
    "{a:1}",
    "../x",
    "/etc/passwd",
    "x/y",
    "a,b",
    "'",
    "[",
    "${model}",
    "???",
    "1",
    "\x00",
    "*",
]


@pytest.mark.parametrize("group", ["model", "tracking", "data", "launcher", "experiment"])
@pytest.mark.parametrize("name", ODD)
def test_odd_presets_are_one_clear_error(group: str, name: str) -> None:
    if (group, name) == ("experiment", "null"):
        return
    with pytest.raises(ConfigError) as caught:
        compose("pretrain_gpt", [f"{group}={name}"])
    assert len(caught.value.problems) == 1


def test_no_experiment() -> None:
    assert compose("pretrain_gpt", ["experiment=null"]) == compose("pretrain_gpt", [])


@pytest.mark.parametrize(
    "word",
    [
        "train.steps=${train.steps}", "train.steps=${foo:1}", "tracking.wandb_name=${oc.env:NO_SUCH_VARIABLE}",
        "tracking.wandb_name=${a", "tracking.wandb_name=???", "train.steps=???", "train.seed=" + 6000 * "9",
        "data.source=" + 3000 * "[" + 3000 * "]", "train.steps=" + 3000 * "[" + 3000 * "]", "launcher.setup=[[1]]",
        "launcher.setup=a", "data.source={a:1}", "data.source=[[a],b]", "data.source=[a", "=5", "+=5", "model.=5",
        "model@x=gpt_tiny", "train.steps=1,", "train.loss_scale={window:[1]}", "launcher.environment={A}", "a b=5",
        "data.weights=[[1]]", "data.weights={a:1}", "train.seed=int(x)", "tracking.wandb_name=${model}",
        "data.weights=${optimizer.beta1}", "objective.ul2_weights=${model.name}", "data.weights=${data.source}",
        "train.steps='", "train.steps=tag(1)",
    ],
)  # fmt: skip
def test_unreadable_words_are_one_short_error(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("pretrain_gpt", [word])
    (problem,) = caught.value.problems
    assert len(problem) < 600
    assert problem.isprintable()
