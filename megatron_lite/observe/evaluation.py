"""The report of an evaluation: a file that the ranks write and the command prints."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_lite.files import replace_file
from megatron_lite.observe.summary import perplexity

EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class EvaluationReport:
    """Losses in nats, accuracies from 0 to 1; None = not applicable or not finite."""

    checkpoint: str
    step: int | None
    """The step of the run at which the checkpoint was saved."""
    text: str
    """Name of the evaluated text."""
    layout: str
    samples: int
    tokens: float
    """Sum of the loss weights of all tokens."""
    loss: float | None
    """The training loss: nats per token, plus nats per sample if samples have a class."""
    token_loss: float | None
    perplexity: float | None
    """exp(token_loss)"""
    accuracy: float | None
    """Fraction of counted tokens whose label has the largest logit."""
    sequence_accuracy: float | None
    """The same for the samples' classes."""

    def write(self, folder: Path) -> None:
        """Write the file atomically."""
        replace_file(folder / EVALUATION_FILE, self.as_json().encode() + b"\n")

    def as_json(self) -> str:
        tokens = int(self.tokens) if self.tokens.is_integer() else self.tokens
        return json.dumps(asdict(self) | {"tokens": tokens}, indent=1)

    def table(self) -> str:
        rows = [
            ("checkpoint", self.checkpoint),
            ("step", "" if self.step is None else f"{self.step:,}"),
            ("text", self.text),
            ("layout", self.layout),
            ("samples", f"{self.samples:,}"),
            ("tokens", f"{self.tokens:,.0f}"),
            ("loss", _number(self.loss, ".6f")),
            ("token loss", "" if self.sequence_accuracy is None else _number(self.token_loss, ".6f")),
            ("perplexity", _number(self.perplexity, ",.3f")),
            ("accuracy", _number(self.accuracy, ".2%")),
            ("class accuracy", "" if self.sequence_accuracy is None else _number(self.sequence_accuracy, ".2%")),
        ]
        return "\n".join(f"{label:<15} {value}" for label, value in rows if value)


def report_of(
    *,
    checkpoint: str,
    step: int | None,
    text: str,
    layout: str,
    samples: int,
    tokens: float,
    loss: float,
    token_loss: float,
    accuracy: float,
    sequence_accuracy: float | None,
) -> EvaluationReport:
    """Build a report from these figures; NaN and Inf, which JSON lacks, become None."""
    return EvaluationReport(
        checkpoint=checkpoint,
        step=step,
        text=text,
        layout=layout,
        samples=samples,
        tokens=tokens,
        loss=_finite(loss),
        token_loss=_finite(token_loss),
        perplexity=_finite(perplexity(token_loss)),
        accuracy=_finite(accuracy),
        sequence_accuracy=None if sequence_accuracy is None else _finite(sequence_accuracy),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None, form: str) -> str:
    return "no finite number" if value is None else format(value, form)
