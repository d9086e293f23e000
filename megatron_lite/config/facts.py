"""What the fields of the schema declare about each setting, by its dotted key."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from megatron_lite.config.decays import settings_of_schedules
from megatron_lite.config.ranges import Range
from megatron_lite.config.resume_effects import SCHEDULE
from megatron_lite.config.schema import RunConfig
from megatron_lite.config.setting import FACTS, SAFE, Facts, Resets, ResumeEffect, RunPart
from megatron_lite.config.texts import Check


@cache
def facts(schema: type = RunConfig) -> dict[str, Facts]:
    """Dotted key -> its facts, in the order of the schema.

    Raises:
        TypeError: names every field that lacks a fact, and what to write.
    """
    declared = {key: (hint, found) for key, hint, found in _walk(schema)}
    problems = [problem for key, (hint, found) in declared.items() for problem in _problems(key, hint, found)]
    problems += [problem for key, (_, found) in declared.items() for problem in _problems_of_schedules(key, found)]
    if problems:
        raise TypeError("\n".join(problems))
    return {key: found for key, (_, found) in declared.items() if found is not None}


def facts_of(key: str) -> Facts:
    """The facts of one setting.

    Raises:
        KeyError: there is no such setting.
    """
    return facts()[key]


@cache
def ranges_of_numbers() -> dict[str, Range]:
    """Dotted key -> its range, for each number and each list of numbers."""
    return {key: found.range for key, found in facts().items() if found.range is not None}


@cache
def rules_of_texts() -> dict[str, Check]:
    """Dotted key -> its rule, for each text and each list or map of texts."""
    return {key: found.text for key, found in facts().items() if found.text is not None}


def effect_on_resume(key: str) -> ResumeEffect:
    """What another value of the setting does to a run that resumes; SAFE for a setting that there no longer is."""
    found = facts().get(key)
    return SAFE if found is None or found.resume is None else found.resume


def _walk(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, Facts | None]]:
    hints = typing.get_type_hints(schema)
    for one in fields(schema):
        hint = hints[one.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _walk(hint, f"{prefix}{one.name}.")
        else:
            yield prefix + one.name, hint, one.metadata.get(FACTS)


def _problems(key: str, hint: Any, found: Facts | None) -> Iterator[str]:
    if found is None:
        yield f"{key} is declared without `setting`; write {key.rpartition('.')[2]}: ... = setting(default, ...)"
        return
    kinds = _kinds(hint)
    is_number, is_text = bool(kinds & {int, float}), (hint is Any and found.expects is None) or str in kinds
    if is_number and found.range is None:
        yield f"{key} is a number without a range; write range=ranges.NAME, of megatron_lite/config/ranges.py"
    if found.range is not None and not is_number:
        yield f"{key} is not a number, but has a range; leave out range="
    if is_text and found.text is None:
        yield f"{key} is a text without a rule; write text=texts.NAME, of megatron_lite/config/texts.py"
    if found.expects is not None and hint is not Any:
        yield f"{key} says which values it expects, but its type does that; leave out expects="
    if found.text is not None and not is_text:
        yield f"{key} is not a text, but has a rule for texts; leave out text="
    if found.resume is None:
        yield (
            f"{key} does not say what another value does to a run that resumes; write resume=SAFE, or "
            "resume=effects.NAME, of megatron_lite/config/resume_effects.py"
        )


def _problems_of_schedules(key: str, found: Facts | None) -> Iterator[str]:
    """What a schedule of the learning rate reads, and what restarts the schedule on a resume, must agree."""
    group, _, name = key.rpartition(".")
    is_read = group == "optimizer" and name in settings_of_schedules()
    effect = None if found is None else found.resume
    restarts = isinstance(effect, Resets) and effect.part is RunPart.schedule
    if is_read and effect is not None and not restarts:
        yield f"{key} is read by a schedule of the learning rate (config/decays.py); write resume=effects.SCHEDULE"
    if effect is SCHEDULE and not is_read:
        yield f"{key} has resume=effects.SCHEDULE, but no schedule reads it; name it in `reads` (config/decays.py)"


def _kinds(hint: Any) -> set[Any]:
    """The types of a setting, or of the entries of its list or map."""
    parts = typing.get_args(hint) or (hint,)
    return {inner for part in parts for inner in (typing.get_args(part) or (part,))}
