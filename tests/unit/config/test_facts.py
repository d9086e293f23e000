"""A field that does not say all that there is to know of its setting is refused, with what to write."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_lite.config import ranges, texts
from megatron_lite.config import resume_effects as effects
from megatron_lite.config.decays import settings_of_schedules
from megatron_lite.config.facts import facts
from megatron_lite.config.schema import Precision
from megatron_lite.config.setting import SAFE, Resets, RunPart, setting

NUMBER = setting(1, range=ranges.STEPS, resume=SAFE)
TEXT = setting("a", text=texts.line, resume=SAFE)


def schema(hint: Any, declared: Any, name: str = "x", group: str = "train") -> type:
    """A schema with one setting."""
    inner = make_dataclass("Inner", [(name, hint, declared)])
    return make_dataclass("Outer", [(group, inner, field(default_factory=inner))])


@pytest.mark.parametrize(
    ("hint", "declared", "message"),
    [
        (int, 4, "train.x is declared without `setting`; write x: ... = setting(default, ...)"),
        (int, setting(4, resume=SAFE), "train.x is a number without a range; write range=ranges.NAME"),
        (float | None, setting(None, resume=SAFE), "train.x is a number without a range"),
        (list[float], setting([1.0], resume=SAFE), "train.x is a number without a range"),
        (list[float] | None, setting(None, resume=SAFE), "train.x is a number without a range"),
        (int, setting(4, range=ranges.STEPS), "train.x does not say what another value does to a run that resumes"),
        (str, setting("a", resume=SAFE), "train.x is a text without a rule; write text=texts.NAME"),
        (Any, setting("a", resume=SAFE), "train.x is a text without a rule"),
        (dict[str, str], setting({}, resume=SAFE), "train.x is a text without a rule"),
        (bool, setting(True, range=ranges.STEPS, resume=SAFE), "train.x is not a number, but has a range"),
        (Precision, setting(Precision.bf16, text=texts.line, resume=SAFE), "train.x is not a text, but has a rule"),
        (str, setting("a", range=ranges.STEPS, text=texts.line, resume=SAFE), "train.x is not a number"),
        (int, setting(4, range=ranges.STEPS, text=texts.line, resume=SAFE), "train.x is not a text"),
    ],
)
def test_a_missing_or_contradictory_fact_is_named(hint: Any, declared: Any, message: str) -> None:
    with pytest.raises(TypeError) as caught:
        facts(schema(hint, declared))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("hint", "remedied"),
    [(int, NUMBER), (list[float] | None, NUMBER), (str | None, TEXT), (Any, TEXT), (bool, setting(True, resume=SAFE))],
)
def test_the_remedies_work(hint: Any, remedied: Any) -> None:
    assert list(facts(schema(hint, remedied))) == ["train.x"]


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(TypeError) as caught:
        facts(make_dataclass("Two", [("a", int, setting(1)), ("b", str, setting("", resume=SAFE))]))
    assert [line.split()[0] for line in str(caught.value).splitlines()] == ["a", "a", "b"]


def test_a_schedule_and_the_grades_of_what_it_reads_agree() -> None:
    read = {f"optimizer.{name}" for name in settings_of_schedules()}
    parts = {key: found.resume.part for key, found in facts().items() if isinstance(found.resume, Resets)}
    assert {key for key, part in parts.items() if part is RunPart.schedule} == {*read, "train.steps"}
    safe = schema(float, setting(0.1, range=ranges.SHARE, resume=SAFE), "decay_fraction", "optimizer")
    with pytest.raises(TypeError, match=r"^optimizer\.decay_fraction is read by a schedule .*effects\.SCHEDULE$"):
        facts(safe)
    unread = schema(float, setting(0.1, range=ranges.SHARE, resume=effects.SCHEDULE), "momentum", "optimizer")
    with pytest.raises(TypeError, match=r"^optimizer\.momentum has resume=effects\.SCHEDULE, but no schedule reads it"):
        facts(unread)


def test_each_configuration_has_its_own_lists() -> None:
    @dataclass
    class Group:
        names: list[str] = setting(["a"], text=texts.line, resume=SAFE)
        values: dict[str, str] = setting({}, text=texts.line, resume=SAFE)

    Group().names.append("b")
    Group().values["c"] = "d"
    assert Group() == Group(["a"], {})
    assert OmegaConf.to_object(OmegaConf.structured(Group)) == Group()
