"""Figures of a recording, and the checked-in table that they are held to.

`budget.yaml` holds one row of measured figures for each case. A rehearsal may not exceed its row; where it needs less,
the test warns, so that the row is tightened. `REHEARSAL_REWRITE=1` writes what was measured instead; the difference of
the file then shows in review what a change costs. `aims` are what the figures are to become.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.rehearsal.record import MICRO_BATCH, Recording

FILE = Path(__file__).with_name("budget.yaml")
HEADER = """\
# What a step may cost in each case of the rehearsal (tests/rehearsal/budget.py); written by REHEARSAL_REWRITE=1.
#
# waits_inside     host waits within the micro-batches of a step       waits_step   those outside of them
# memory           peak of the device / what the plan predicts         left         bytes that a run leaves behind
# kernels, kbytes  launched, and read and written by them, per step    wire_*       sent / minimum of the layout
#                  below 1: weights that ZeRO-3 keeps from the forward pass, or a sum that is missing
# layers           one more layer, forward and backward, of one micro-batch
"""
AIMS = {"waits_inside": 0, "waits_step": 2, "memory": 1.03, "left": 0, "wire": 1.02}
GROUPS = ("data", "tensor", "pipeline", "stages", "world", "other")
_SMALLEST = 0.001
"""Ratios are held to this: they are rounded up to it in the table."""
FORGOTTEN = 16 * 1024
"""Bytes that figures of earlier steps may occupy (`LayerMeter`), or that a group without activations, gradients and
weights may send (norm and loss). More is a tensor that was forgotten, or one in the wrong group."""


def rewriting() -> bool:
    return os.environ.get("REHEARSAL_REWRITE") == "1"


def figures_of(recording: Recording) -> dict[str, float]:
    """The figures of one step like all others, by their names in the table."""
    acts = recording.acts
    step, last = acts["step"], acts["last_step"]
    left = last.left_bytes - step.left_bytes
    found: dict[str, float] = {
        "waits_inside": sum(step.waits_in_micro_batches.values()),
        "waits_step": sum(step.waits_outside.values()),
        "memory": _up(step.peak_bytes / recording.planned_bytes),
        "left": left if left > FORGOTTEN else 0,
        "kernels": step.total.kernels,
        "kbytes": math.ceil(step.total.bytes / 1000),
    }
    for group in GROUPS:
        sent, least = step.wire_bytes(group), recording.minimum_wire_bytes.get(group, 0.0)
        if least:
            found[f"wire_{group}"] = _up(sent / least)
        elif sent > FORGOTTEN:
            found[f"wire_{group}"] = math.inf
    return found


def layer_figures(one_layer: Recording, two_layers: Recording) -> dict[str, float]:
    """What the second layer adds to the forward and backward pass of a micro-batch."""

    def added(quantity: str, unit: float) -> int:
        one, two = (_in_micro_batches(recording, quantity) for recording in (one_layer, two_layers))
        return math.ceil((two - one) / two_layers.num_micro_batches / unit)

    return {"kernels": added("kernels", 1), "mbytes": added("bytes", 1e6), "gflop": added("flops", 1e9)}


def _in_micro_batches(recording: Recording, quantity: str) -> int:
    work = recording.acts["first_step"].work
    return sum(getattr(work[phase], quantity) for phase in MICRO_BATCH if phase in work)


def _up(ratio: float) -> float:
    return math.ceil(ratio / _SMALLEST - 1e-9) * _SMALLEST if ratio < 1e6 else ratio


@dataclass(frozen=True)
class Comparison:
    exceeded: dict[str, str]
    """Figure -> how it exceeds the table."""
    tighter: dict[str, str]
    """Figure -> how much less it needs than the table says."""


def compare(measured: Mapping[str, float], row: Mapping[str, float]) -> Comparison:
    exceeded, tighter = {}, {}
    for name in sorted(measured.keys() | row.keys()):
        now, held = measured.get(name, 0.0), row.get(name, 0.0)
        if now > held + _SMALLEST / 2:
            exceeded[name] = f"{name} is {now:g}, the table allows {held:g}"
        elif now < held - _SMALLEST / 2:
            tighter[name] = f"{name} is {now:g}, the table says {held:g}"
    return Comparison(exceeded, tighter)


def waits_of(recording: Recording) -> Iterator[str]:
    """Where the host waits in a step, most often first; for messages."""
    for phase, found in recording.acts["step"].waits.items():
        for where, count in found.most_common():
            yield f"{count} x {phase}: {where}"


def read() -> dict[str, dict[str, Any]]:
    table = yaml.safe_load(FILE.read_text()) if FILE.exists() else {}
    return {section: table.get(section) or {} for section in ("cases", "layers")}


def write(kind: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Replace these rows of `cases` or `layers`."""
    table = read()
    table[kind] = {**table[kind], **rows}
    text = f"{HEADER}aims: {_flow(AIMS)}\n"
    for section, found in table.items():
        text += f"{section}:\n" + "".join(f"  {name}: {_flow(row)}\n" for name, row in sorted(found.items()))
    FILE.write_text(text)


def _flow(row: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {value:.10g}" for name, value in row.items()) + "}"
