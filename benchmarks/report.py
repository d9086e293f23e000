"""Medians, ratios and targets, as tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one figure."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        return cls(tuple(values))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def text(self, digits: int = 3) -> str:
        low, high = min(self.values), max(self.values)
        return f"{self.median:,.{digits}f} ({low:,.{digits}f} - {high:,.{digits}f})"


def ratios(numerator: Sample, denominator: Sample) -> Sample:
    """Ratio of each turn: the two were measured one right after the other, so a slow minute cancels out."""
    return Sample.of([a / b for a, b in zip(numerator.values, denominator.values, strict=True)])


@dataclass(frozen=True)
class Target:
    """A figure that we aim for."""

    name: str
    measured: float
    bound: float
    at_most: bool = False
    unit: str = ""
    note: str = ""

    @property
    def met(self) -> bool:
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


def show_systems(console: Console, title: str, rows: Sequence[tuple[str, Sample, Sample, float]]) -> None:
    """Rows: system, CPU-seconds a step, wall seconds a step, fraction of the GEMM peak."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in ("system", "CPU-s a step: median (min - max)", "wall s a step", "of GEMM peak"):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for name, cpu, wall, fraction in rows:
        table.add_row(name, cpu.text(), wall.text(), f"{100 * fraction:.0f} %")
    console.print(table)


def show_targets(console: Console, targets: Sequence[Target]) -> None:
    table = Table(title="Targets", title_justify="left", title_style="bold")
    for heading in ("figure", "measured", "target", "", "note"):
        table.add_column(heading, justify="right" if heading in ("measured", "target") else "left")
    for target in targets:
        table.add_row(
            target.name,
            f"{target.measured:,.2f}{target.unit}",
            f"{'<=' if target.at_most else '>='} {target.bound:,.2f}{target.unit}",
            "met" if target.met else "MISSED",
            target.note,
            style=None if target.met else "yellow",
        )
    console.print(table)
