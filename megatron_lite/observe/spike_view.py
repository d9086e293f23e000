"""The report of a spike as texts and table rows for report.html."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lite.observe.phrasing import counted, span

MOST_RANGES = 4
MOST_DOCUMENTS = 200


@dataclass(frozen=True)
class LayerRow:
    layer: str
    norms: list[str]
    """One for each step of the spike report."""
    jump: float | None
    """Norm at the spike / median norm of the steps before it; infinite if the norm at the spike is NaN or Inf."""


@dataclass(frozen=True)
class SpikeView:
    """A spike, formatted for display."""

    step: int
    kinds: str
    action: str
    text: str
    facts: list[tuple[str, str]]
    documents: list[Mapping[str, Any]]
    """At most MOST_DOCUMENTS."""
    num_documents: int
    """Number of all documents."""
    sequences: list[Mapping[str, Any]]
    steps: list[int]
    layers: list[LayerRow]
    found: bool
    """Whether the file of the spike report could be read."""

    @classmethod
    def of(cls, spike: Mapping[str, Any], spike_report: Mapping[str, Any] | None) -> SpikeView:
        """
        Args:
            spike: the event.
            spike_report: the file that the event names; None = it cannot be read, so only the event is shown.
        """
        known = {**spike, **(spike_report or {})}
        norms = {int(step): layers for step, layers in (known.get("layer_grad_norm") or {}).items()}
        steps = sorted(norms)
        documents = known.get("documents") or []
        return cls(
            step=int(spike["step"]),
            kinds=", ".join(str(kind).replace("_", " ") for kind in spike.get("kinds", [])),
            action=str(spike.get("action", "")).replace("_", " "),
            text=str(spike.get("text", "")).removeprefix(f"spike at step {spike['step']}: "),
            facts=_facts(known),
            documents=documents[:MOST_DOCUMENTS],
            num_documents=len(documents),
            sequences=known.get("sequences") or [],
            steps=steps,
            layers=_layers(norms, steps, int(spike["step"])),
            found=spike_report is not None,
        )

    @property
    def largest(self) -> LayerRow | None:
        """The layer with the largest jump."""
        return max((row for row in self.layers if row.jump is not None), key=lambda row: row.jump or 0.0, default=None)


def _facts(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("loss", _judged(known, "loss")),
        ("gradient norm", _judged(known, "grad_norm")),
        ("learning rate", number_text(known.get("learning_rate"))),
        ("loss scale", number_text(known.get("loss_scale"))),
        ("samples", ranges(known.get("samples") or [])),
        ("checkpoint before", str(known.get("checkpoint") or "none")),
    ]
    return [(label, text) for label, text in rows if text]


def _judged(known: Mapping[str, Any], name: str) -> str:
    """`9.1, usual is 5.2: 21.0 robust deviations above`."""
    value, usual, deviations = (known.get(key) for key in (name, f"usual_{name}", f"{name}_deviations"))
    text = number_text(value)
    if text and isinstance(usual, int | float):
        text += f", usual is {number_text(usual)}"
    if text and isinstance(deviations, int | float):
        text += f": {deviations:.1f} robust deviations {'above' if deviations >= 0 else 'below'}"
    return text


def ranges(samples: Sequence[Sequence[int]]) -> str:
    """`1,024 to 1,087` for [[1024, 1088]]; of many ranges only the first ones."""
    texts = [span(first, stop - 1) for first, stop in samples[:MOST_RANGES]]
    more = len(samples) - MOST_RANGES
    return ", ".join(texts) + (f" and {counted(more, 'more range')}" if more > 0 else "")


def _layers(norms: Mapping[int, Mapping[str, Any]], steps: Sequence[int], spike: int) -> list[LayerRow]:
    names = list(dict.fromkeys(name for step in steps for name in norms[step]))
    before = [step for step in steps if step < spike]
    rows = []
    for name in names:
        values = {step: norms[step].get(name) for step in steps}
        usual = [value for step in before if isinstance(value := values[step], int | float) and math.isfinite(value)]
        rows.append(LayerRow(name, [number_text(values[step]) for step in steps], _jump(usual, values.get(spike))))
    return rows


def _jump(usual: Sequence[float], at: Any) -> float | None:
    if not usual or not isinstance(at, int | float):
        return None
    middle = statistics.median(usual)
    return math.inf if not math.isfinite(at) else at / middle if middle else None


def number_text(value: Any) -> str:
    """A number with four significant digits; empty if the value is not a number."""
    return f"{value:.4g}" if isinstance(value, int | float) else ""
