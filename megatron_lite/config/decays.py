"""How the learning rate decays after the warm-up: the only definition of the schedules.

A decay is a member of `Decay` together with its `DecayForm`: its curve, the settings that the curve reads, and the
source of its formula. The setting `optimizer.decay`, its rules, the messages of a resume, the plan and the learning
rate itself all use it. docs/extending.md shows how to add one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from megatron_lite.config.training import OptimizerConfig

Curve = Callable[[int, int, "OptimizerConfig"], float]
"""Maps (step after the warm-up, step at which the decay ends, settings) to the learning rate. It is called only for
steps before the end; a curve without an end may be called for any step, and must not use the end."""

ALWAYS_READ = ("learning_rate", "warmup_steps", "decay")
"""Settings of OptimizerConfig that every schedule depends on."""


@dataclass(frozen=True)
class DecayForm:
    """The definition of a decay."""

    curve: Curve
    reads: tuple[str, ...]
    """Settings of OptimizerConfig that the curve depends on, besides ALWAYS_READ. With `decay_steps` among them it has
    an end, and stays at min_learning_rate from there on."""
    explanation: str
    source: str
    """Reference for the formula."""

    @property
    def has_end(self) -> bool:
        return "decay_steps" in self.reads

    def depends_on(self, name: str) -> bool:
        """Whether a change of this setting of OptimizerConfig changes the learning rate."""
        return name in ALWAYS_READ or name in self.reads


def _constant(step: int, end: int, config: OptimizerConfig) -> float:
    return config.learning_rate


def _linear(step: int, end: int, config: OptimizerConfig) -> float:
    return _between(config, 1.0 - _fraction(step, end, config))


def _cosine(step: int, end: int, config: OptimizerConfig) -> float:
    return _between(config, 0.5 * (1.0 + math.cos(math.pi * _fraction(step, end, config))))


def _inverse_sqrt(step: int, end: int, config: OptimizerConfig) -> float:
    """T5's 1 / sqrt(max(step, warmup_steps)), scaled to begin at the peak."""
    falling = config.learning_rate * math.sqrt(max(config.warmup_steps, 1) / step)
    return max(config.min_learning_rate, falling)


def _wsd(step: int, end: int, config: OptimizerConfig) -> float:
    start = max(config.warmup_steps, (1.0 - config.decay_fraction) * end)
    return _between(config, 1.0 if step <= start else 1.0 - (step - start) / (end - start))


def _fraction(step: int, end: int, config: OptimizerConfig) -> float:
    """Completed fraction of the steps between the warm-up and the end."""
    return (step - config.warmup_steps) / (end - config.warmup_steps)


def _between(config: OptimizerConfig, share: float) -> float:
    """min_learning_rate plus this share of the difference between it and the peak."""
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * share


class Decay(StrEnum):
    """Values of `optimizer.decay`. Each curve begins at the peak, so the learning rate does not jump there."""

    form: DecayForm

    def __new__(cls, word: str, form: DecayForm | None = None) -> Self:
        if form is None:
            raise TypeError(f'optimizer.decay={word} has no curve; write `{word} = "{word}", DecayForm(...)`')
        member = str.__new__(cls, word)
        member._value_ = word
        member.form = form
        return member

    @property
    def explanation(self) -> str:
        """The explanation, with the source of the formula."""
        source = self.form.source
        return f"{self.form.explanation} ({source})" if source else self.form.explanation

    constant = "constant", DecayForm(_constant, reads=(), explanation="stays at learning_rate", source="")
    linear = (
        "linear",
        DecayForm(
            _linear,
            reads=("min_learning_rate", "decay_steps"),
            explanation="a straight line to min_learning_rate",
            source="arXiv 1810.04805",  # BERT
        ),
    )
    cosine = (
        "cosine",
        DecayForm(
            _cosine,
            reads=("min_learning_rate", "decay_steps"),
            explanation="half a cosine wave to min_learning_rate, without restarts",
            source="arXiv 1608.03983",  # as in GPT-3
        ),
    )
    inverse_sqrt = (
        "inverse_sqrt",
        DecayForm(
            _inverse_sqrt,
            reads=("min_learning_rate",),
            explanation="learning_rate x sqrt(warmup_steps / step), not below min_learning_rate; has no end",
            source="arXiv 1910.10683, section 3.1.2",  # T5
        ),
    )
    wsd = (  # warm-up, stable, decay
        "wsd",
        DecayForm(
            _wsd,
            reads=("min_learning_rate", "decay_steps", "decay_fraction"),
            explanation="stays at learning_rate, and goes straight to min_learning_rate in the last decay_fraction",
            source="arXiv 2404.06395, section 4",  # MiniCPM
        ),
    )


def settings_of_schedules() -> tuple[str, ...]:
    """All settings of OptimizerConfig that some schedule reads."""
    return tuple(dict.fromkeys((*ALWAYS_READ, *(name for decay in Decay for name in decay.form.reads))))
