"""How a setting is declared: all that there is to know of it stands at its field.

    hidden_size: int = setting(128, range=ranges.WIDTH, resume=effects.SHAPES)
    \"\"\"Width of the residual stream.\"\"\"

A number needs a range, a text needs a rule, and each setting needs an effect on a resumed run. `facts.py` reads what is
declared, and refuses a field that lacks one. docs/extending.md shows how to add a setting.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, TypeVar

from megatron_lite.config.ranges import Range
from megatron_lite.config.texts import Check

if TYPE_CHECKING:
    from megatron_lite.config.schema import RunConfig

T = TypeVar("T")
FACTS = "megatron_lite.facts"  # key of a field's metadata

Consequence = Callable[["RunConfig", "RunConfig", str], str]
"""Maps the configurations before and after the change, and the dotted key, to what the change resets; empty = nothing,
for these values. Its docstring describes that for any values."""


class Grade(StrEnum):
    safe = "safe"
    resets = "resets"
    forbidden = "forbidden"


class RunPart(StrEnum):
    """Parts of a run that restart with new values; a resume prints one line for each."""

    schedule = "schedule"
    masks = "masks"
    batches = "batches"


@dataclass(frozen=True)
class Safe:
    """The new value is used, and nothing else changes."""

    grade: ClassVar[Grade] = Grade.safe
    description: ClassVar[str] = "the run continues with the new value"


SAFE = Safe()


@dataclass(frozen=True)
class Resets:
    """The run resumes, but a part of it restarts, or what follows is not comparable with what was before."""

    grade: ClassVar[Grade] = Grade.resets
    consequence: Consequence
    part: RunPart | None = None
    moves_losses: bool = False
    """Whether losses or gradient norms jump, so that those of earlier steps are not comparable."""

    @property
    def description(self) -> str:
        return self.consequence.__doc__ or ""


@dataclass(frozen=True)
class Forbidden:
    """Another value would make it another run."""

    grade: ClassVar[Grade] = Grade.forbidden
    rule: str
    weights_fit: bool
    """Whether another run can start from these weights."""
    same_tokens_are_safe: bool = False
    """Whether the setting matters only through the resulting tokens: a change has no effect if the data keeps its
    fingerprint, such as a renamed file, or a separator if no text file is read."""

    @property
    def description(self) -> str:
        text = self.rule
        if self.same_tokens_are_safe:
            text += "; another spelling of the same tokens is safe"
        if self.weights_fit:
            text += "; a new run can begin with the weights: model.init_from=CHECKPOINT"
        return text


ResumeEffect = Safe | Resets | Forbidden


@dataclass(frozen=True)
class Facts:
    """What a field declares about its setting, besides type, default and meaning."""

    range: Range | None
    """Of a number, or of each number in a list."""
    text: Check | None
    """The rule of a text, or of each text in a list or a map."""
    resume: ResumeEffect | None
    expects: str | None = None
    """The values of a setting of type `Any` that is no text."""


def setting(
    default: T,
    *,
    range: Range | None = None,
    text: Check | None = None,
    resume: ResumeEffect | None = None,
    expects: str | None = None,
) -> T:
    """A field of a group of settings.

    Args:
        default: each configuration gets its own copy of a list or a map.
        range: the values of a number that work, whatever the other settings are (`config/ranges.py`).
        text: what is wrong with a text (`config/texts.py`).
        resume: what another value does to a run that resumes (`SAFE`, or one of `config/resume_effects.py`).
        expects: of a setting of type `Any` that is no text, in words, such as "even or a list of integers"; a rule in
            `config/rules/` checks the value.
    """
    metadata = {FACTS: Facts(range, text, resume, expects)}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)
