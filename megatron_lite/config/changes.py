"""What may change between the attempts of one run: every setting has a grade, declared at its field in the schema.

A run resumes from its newest checkpoint with any safe change, reports what a change resets, and refuses changes that
would make it another run. `resume_effects.py` has the effects that fields name.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.config.facts import effect_on_resume
from megatron_lite.config.keys import as_word, get_value, leaf_keys
from megatron_lite.config.same_weights import same_weights
from megatron_lite.config.schema import RunConfig
from megatron_lite.config.setting import Forbidden, Grade, Resets, RunPart


@dataclass(frozen=True)
class Change:
    """One setting that has changed."""

    key: str
    before: Any
    after: Any
    grade: Grade
    consequence: str
    """The effect; for a forbidden change the rule that it breaks. Empty if there is nothing to report."""
    remedy: str = ""
    """What to do instead; only for forbidden changes."""
    part: RunPart | None = None
    """Only for changes that reset something."""
    moves_losses: bool = False
    """As in `Resets`."""

    def __str__(self) -> str:
        text = f"{self.key}: {as_typed(self.before)} -> {as_typed(self.after)}"
        return f"{text}; {self.consequence}" if self.consequence else text


DATA_KEYS = tuple(
    key for key in leaf_keys() if isinstance(effect := effect_on_resume(key), Forbidden) and effect.same_tokens_are_safe
)
"""Settings that matter only through the resulting tokens."""
UNDECIDED = "the run continues only with the tokens that it had, which is checked when the data is ready"


def on_resume(key: str) -> tuple[Grade, str]:
    """The grade of a setting and its effect on a resumed run, for any values."""
    effect = effect_on_resume(key)
    return effect.grade, effect.description


def grade_changes(
    previous: RunConfig,
    current: RunConfig,
    checkpoint: Path | None = None,
    *,
    same: Collection[str] = (),
    undecided: Collection[str] = (),
) -> list[Change]:
    """Every setting that differs between two resolved configurations of one run, in the order of the schema.

    Args:
        checkpoint: of the run; the remedy suggests starting another run from it.
        same: those of DATA_KEYS that are known to give the same tokens, even if spelled differently.
        undecided: those of DATA_KEYS for which that is not known yet.
    """
    differing = [key for key in leaf_keys() if get_value(previous, key) != get_value(current, key)]
    graded = []
    for key in differing:
        settled = _may_be_respelled(key, previous, current) and (key in same or key in undecided)
        text = UNDECIDED if settled and key in undecided else ""
        safe = Change(key, get_value(previous, key), get_value(current, key), Grade.safe, text)
        graded.append(safe if settled else _graded(key, previous, current, checkpoint))
    return graded


def _may_be_respelled(key: str, before: RunConfig, after: RunConfig) -> bool:
    """Whether the data's fingerprint determines the whole effect of a setting.

    A trained tokenizer also determines the model's vocabulary size, which the tokens alone do not show.
    """
    trained = [config.data.tokenizer == "train" for config in (before, after)]
    if key == "data.tokenizer":
        return trained[0] == trained[1]
    return key != "data.tokenizer_vocab_size" or not any(trained)


def refusals(changes: Sequence[Change], where: str) -> list[str]:
    """One message for each change that is forbidden: `key=value rule; remedy`.

    Args:
        where: where the earlier settings were used, for messages.
    """
    return [
        f"{change.key}={as_typed(change.after)} cannot continue from {as_typed(change.before)} of {where}: "
        f"{change.consequence}; {change.remedy}"
        for change in changes
        if change.grade is Grade.forbidden
    ]


def table(changes: Sequence[Change]) -> list[str]:
    """A line for each change; changes that reset something come first."""
    order = [Grade.forbidden, Grade.resets, Grade.safe]
    return [f"{change.grade:<10} {change}" for change in sorted(changes, key=lambda change: order.index(change.grade))]


def as_typed(value: Any) -> str:
    """A value as the user would type it, without secrets."""
    if value is None or isinstance(value, bool):
        return as_word(value)
    if isinstance(value, list):
        return f"[{','.join(map(as_typed, value))}]"
    if isinstance(value, dict):  # launcher.environment, whose values may be secrets
        return f"{{{','.join(f'{name}: ...' for name in value)}}}"
    text = str(value)
    return text if text and text.isprintable() and " " not in text else repr(text)


def _graded(key: str, previous: RunConfig, current: RunConfig, checkpoint: Path | None) -> Change:
    before, after = get_value(previous, key), get_value(current, key)
    if key == "model.init_from" and (reason := same_weights(before, after)) is not None:
        return Change(key, before, after, Grade.safe, reason)
    effect = effect_on_resume(key)
    if isinstance(effect, Forbidden):
        remedy = f"keep {key}={as_typed(before)}, or begin another run in a new train.run_dir"
        if effect.weights_fit and checkpoint is not None:
            remedy += f" with model.init_from={checkpoint}"
        return Change(key, before, after, Grade.forbidden, effect.rule, remedy)
    if isinstance(effect, Resets):
        consequence = effect.consequence(previous, current, key)
        grade = Grade.resets if consequence else Grade.safe  # losses may jump all the same, as from fp32 to bf16
        return Change(key, before, after, grade, consequence, part=effect.part, moves_losses=effect.moves_losses)
    return Change(key, before, after, Grade.safe, "")
