"""Every number and every text of the schema has an entry that says what it may be, and the entries are right."""

from __future__ import annotations

import math
import typing
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from launch.hostfile import with_hosts
from megatron_lite.config.compose import compose
from megatron_lite.config.derived import fill_in
from megatron_lite.config.facts import ranges_of_numbers, rules_of_texts
from megatron_lite.config.frozen import check_run_folder
from megatron_lite.config.keys import get_value, leaf_keys, schema_keys, text_shape
from megatron_lite.config.lengths import SMALLEST_BPE
from megatron_lite.config.ranges import Range
from megatron_lite.config.rules.values import out_of_form, out_of_range
from megatron_lite.config.schema import RunConfig
from megatron_lite.config.texts import label, path
from megatron_lite.config.validate import problems
from megatron_lite.data.tokenizer import vocabulary
from megatron_lite.errors import ConfigError

BASE = fill_in(compose("pretrain_gpt", []), device="cpu")
SPANS = fill_in(compose("pretrain_t5", ["objective=ul2", "model.max_position_embeddings=16777216"]), device="cpu")

RANGES, TEXTS = ranges_of_numbers(), rules_of_texts()


def kinds(key: str) -> set[Any]:
    """The types of a setting, or of the entries of its list, without None."""
    hint = schema_keys()[key]
    parts = set(typing.get_args(hint)) or {hint}
    parts = {inner for part in parts for inner in (typing.get_args(part) or (part,))}
    return parts - {type(None)}


def test_every_setting_has_an_entry() -> None:
    """Declared at its field: the range that the use of a number can stand, or the rule of a text."""
    numbers = {key for key in leaf_keys() if kinds(key) & {int, float}}
    texts = {key for key in leaf_keys() if text_shape(key)}
    others = {key for key in leaf_keys() if all(kind is bool or issubclass(kind, Enum) for kind in kinds(key) - {Any})}
    assert set(RANGES) == numbers
    assert set(TEXTS) == texts
    assert set(leaf_keys()) == numbers | texts | others


def changed(key: str, value: Any, base: RunConfig = BASE) -> RunConfig:
    """With one setting changed, whatever its type."""

    def within(part: Any, names: list[str]) -> Any:
        name, *rest = names
        return replace(part, **{name: within(getattr(part, name), rest) if rest else value})

    result = within(base, key.split("."))
    assert isinstance(result, RunConfig)
    return result


def said(key: str, number: float) -> list[str]:
    value = [number] if "list" in str(schema_keys()[key]) else number
    return [message for broken, message in out_of_range(changed(key, value)) if broken == key]


@pytest.mark.parametrize("key", RANGES)
def test_what_no_number_may_be(key: str) -> None:
    for number in (math.nan, math.inf, -math.inf, 1e300, 10**400, -(10**400)):
        assert len(said(key, number)) == 1, number


@pytest.mark.parametrize("key", RANGES)
def test_bounds_belong_to_the_range(key: str) -> None:
    allowed = RANGES[key]
    for number in (allowed.least, allowed.most):
        assert said(key, number) == []
    for number in (math.nextafter(allowed.most, math.inf), math.nextafter(allowed.least, -math.inf)):
        assert len(said(key, number)) == 1


@pytest.mark.parametrize("key", RANGES)
def test_the_bound_that_a_message_names_is_accepted(key: str) -> None:
    for message in said(key, 2 * RANGES[key].most + 1):
        named = message.rpartition("use at most ")[2]
        if named != message:
            assert said(key, int(named) if named.isdecimal() else float(named)) == []


@pytest.mark.parametrize("key", RANGES)
@pytest.mark.parametrize("base", [BASE, SPANS], ids=["gpt", "ul2"])
def test_validation_ends_at_every_bound(key: str, base: RunConfig) -> None:
    """No rule counts up to a number: at its bound it has an answer, and an exception is a failure here."""
    if "list" not in str(schema_keys()[key]):
        kind = int if int in kinds(key) else float
        for number in (RANGES[key].least, RANGES[key].most):
            problems(changed(key, kind(number), base))


def test_defaults_are_in_range() -> None:
    assert list(out_of_range(RunConfig())) == []
    assert list(out_of_form(RunConfig())) == []


def test_a_range_speaks_once() -> None:
    allowed = Range(1, 5, lambda value: value > 0, "must be positive; use more", "the least", "the most")
    assert [allowed.problem(value) for value in (-1, 0.5, 3, 6)] == [
        "must be positive; use more",
        "is less than 1, the least; use 1 or more",
        None,
        "is more than 5, the most; use at most 5",
    ]


BAD_PATHS = [
    "",
    " ",
    "\t",
    "a\nb",
    "a\0b",
    "a\x1b[31m",
    256 * "a",
    86 * "日",
    "a/" + 300 * "b" + "/c",
    2000 * "a/",
    "\udcff",
    "~nobody-of-this-name/x",
]


@pytest.mark.parametrize("key", [key for key, check in TEXTS.items() if check is path])
@pytest.mark.parametrize("text", BAD_PATHS)
def test_what_no_path_may_be(key: str, text: str) -> None:
    for value in (text, [text]) if text_shape(key) and key.endswith("source") else (text,):
        found = [message for broken, message in out_of_form(changed(key, value)) if broken == key]
        assert len(found) == 1
        assert found[0].isprintable()


@pytest.mark.parametrize("name", ["", "..", ".", "a/b", "../x", "/x", "a\0", "a\nb", 161 * "a", "\udcff"])
def test_what_no_name_of_a_model_may_be(name: str) -> None:
    assert label(name) is not None
    assert any(message.startswith("model.name=") for message in problems(changed("model.name", name)))


@pytest.mark.parametrize("name", ["gpt2", "a b", "..a", "日本語", "x" * 160])
def test_names_of_models(name: str) -> None:
    assert problems(changed("model.name", name)) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.source", ["a", 5]), ("data.source", {"a": "b"}), ("data.source", [["a"]]), ("data.source", [None]),
        ("launcher.setup", [["a"]]), ("launcher.environment", {"A": 5}), ("data.source", 5), ("data.source", [{}]),
    ],
)  # fmt: skip
def test_entries_are_texts_at_every_depth(key: str, value: Any) -> None:
    """What a preset's YAML can bring past the types of the schema."""
    found = [message for broken, message in out_of_form(changed(key, value)) if broken == key]
    assert found or get_value(changed(key, value), key) == {"a": "b"}


def test_folder_that_a_sweep_makes_too_long() -> None:
    with pytest.raises(ConfigError, match=r"holds a name of 300 bytes"):
        check_run_folder(BASE, Path("runs") / (300 * "a"))


def test_smallest_trained_vocabulary() -> None:
    """Two rooms need the number, and the lower one must not import the upper."""
    assert SMALLEST_BPE == vocabulary.SMALLEST_BPE


@pytest.mark.parametrize("text", ["", 300 * "a", "a\0b", "a\nb", "~nobody-of-this-name/x"])
def test_files_that_are_read_before_all_is_checked(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.init_from="):
        compose("pretrain_gpt", [f"model.init_from={text}"])
    with pytest.raises(ConfigError, match=r"^launcher\.hostfile="):
        with_hosts(compose("pretrain_gpt", ["launcher=deepspeed", f"launcher.hostfile={text}"]))
