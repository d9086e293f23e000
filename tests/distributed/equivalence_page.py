"""Builds the text of docs/equivalence.md from the results of `write_equivalence.py`."""

from __future__ import annotations

import math
import platform
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from megatron_lite.config.schema import Precision
from megatron_lite.verify.equivalence import TOLERANCE
from tests.distributed import equivalence_cases as cases


@dataclass(frozen=True)
class CaseResult:
    """Largest relative differences of a model in a layout; the fields are the columns of equivalence.csv."""

    model: str
    layout: str
    ranks: int
    gradients: int  # how many were compared
    gradient: float
    gradient_of: str
    gradient_norm: float  # of ten steps
    loss: float  # of ten steps
    between_tensor_ranks: float  # gradients of replicated parameters
    z_loss: float  # of ten steps; 0 without
    last_loss: float  # itself, in nats

    @property
    def worst(self) -> float:
        return max(self.gradient, self.gradient_norm, self.loss, self.between_tensor_ranks, self.z_loss)


@dataclass(frozen=True)
class FaultResult:
    fault: str
    model: str
    layout: str
    what: str
    difference: float


@dataclass(frozen=True)
class UpdateResult:
    layout: str
    precision: Precision
    difference: float
    of_fault: float


@dataclass(frozen=True)
class Results:
    cases: list[CaseResult]
    faults: list[FaultResult]
    updates: list[UpdateResult]


_HEAD = """# Does the layout change the training?

`make equivalence` measured and wrote this page on {date}: {cases} combinations of model and layout, all within the
tolerance. Where one is not, it writes nothing and ends with exit code 1. `make test` holds the same cases. Every
number: [equivalence.csv](equivalence.csv).

{versions}

**What is compared.** A small model trains ten steps twice, from the same weights and on the same samples: under the
layout (DeepSpeed, one process for each rank, gloo on a CPU), and in one process by a plain torch loop without
DeepSpeed, process groups or sharding (`megatron_lite/verify/equivalence.py`). All of it in fp32, with Adam, a global
batch of 8 in two or more micro-batches, a warm-up, clipping, tokens without loss weight that are spread unevenly, and
a vocabulary of {vocabulary}, which no tensor-parallel size divides.

- **gradient**: of each parameter in the first step, after all reductions and before clipping: the norm of the
  difference over the norm of the gradient, for the full tensor. Each rank's copy of a replicated or tied parameter
  counts.
- **gradient norm** and **loss**: of each of the ten steps, the difference over the value. The norm is that of the whole
  model, before clipping.
- **tolerance**: {tolerance}, for each of them. fp32 rounds at 6e-8, and a sum in another order rounds differently.

Under tensor parallelism the dropout of attention is off, and under sequence parallelism that of hidden states: each
rank draws masks for its own part ([ARCHITECTURE.md](../ARCHITECTURE.md)).

For your own model and layout: `python -m launch verify pretrain_gpt parallel=dp2_tp2_pp2`.
"""
_OTHERS = """## Figures of another project

[torchtitan issue 3029](https://github.com/pytorch/torchtitan/issues/3029) (comment of 4 August 2026) has the losses of
a debug model under 18 layouts on up to 8 GPUs, with one seed, deterministic operations and a global batch of 8: at step
1 from 12.03 to 12.08, at step 10 from 9.73 to 9.97, and 9.82 on one GPU, so up to 1.6 % apart. Model and hardware are
other ones, and the losses differ from step 1 on, so the layouts may not begin with the same weights or samples: the
figures measure something else than this page. Where losses spread so far, a fault that moves them by one percent does
not stand out.
"""


def page(results: Results) -> str:
    head = _HEAD.format(
        date=date.today().isoformat(),
        cases=len(results.cases),
        versions=versions(),
        vocabulary=cases.VOCAB_SIZE,
        tolerance=f"{TOLERANCE:g}",
    )
    parts = [head, _largest(results.cases), _layouts(results.cases), _losses(results.cases), _OTHERS]
    return "\n".join([*parts, _updates(results.updates), _faults(results.faults)])


def versions() -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    kernels = torch.backends.cpu.get_cpu_capability()
    return f"Python {platform.python_version()}, {packages}; {_processor()}, {kernels} kernels, one thread a rank."


def _processor() -> str:
    """For example `AMD EPYC (x86_64)`."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'} ({platform.machine()})"


def _largest(rows: Sequence[CaseResult]) -> str:
    lines = []
    for title, field in (
        ("gradient of a parameter", "gradient"),
        ("gradient norm, ten steps", "gradient_norm"),
        ("loss, ten steps", "loss"),
        ("replicated gradients, between tensor ranks", "between_tensor_ranks"),
        ("z-loss, ten steps", "z_loss"),
    ):
        row = max(rows, key=lambda row: getattr(row, field))
        of = f", `{row.gradient_of}`" if field == "gradient" else ""
        where = f"{row.model} on {row.layout}{of}" if getattr(row, field) else "equal bit for bit"
        lines.append((title, _number(getattr(row, field)), where))
    compared = sum(row.gradients for row in rows)
    text = f"{compared:,} gradients, {len(rows) * cases.NUM_STEPS:,} norms and as many losses."
    table = _table(("largest relative difference of a", "", "where"), lines)
    return f"## The largest differences\n\n{text}\n\n{table}"


def _layouts(rows: Sequence[CaseResult]) -> str:
    lines = []
    for layout in cases.LAYOUTS:
        of_layout = [row for row in rows if row.layout == layout]
        cells = [
            _number(max((row.worst for row in of_layout if row.model in models), default=None))
            for models in cases.FAMILIES.values()
        ]
        lines.append((f"`{layout}`", str(max((row.ranks for row in of_layout), default=0)), *cells))
    members = "\n".join(f"- {family}: {', '.join(models)}" for family, models in cases.FAMILIES.items())
    table = _table(("layout", "ranks", *cases.FAMILIES), lines)
    what = _paragraph(
        "The largest difference of anything compared, over the models of the family that were run under the layout;",
        "- where none was. `dp2_tp2_pp2` is data x tensor x pipeline; without `zeroN` in its name a layout has ZeRO-1.",
    )
    return f"## By layout and family\n\n{what}\n{table}\nThe models:\n\n{members}\n"


def _losses(rows: Sequence[CaseResult]) -> str:
    lines = []
    for model in cases.MODELS:
        losses = [row.last_loss for row in rows if row.model == model]
        if "dropout" not in model and losses:  # their masks, and so their twins, differ by layout
            lines.append((model, str(len(losses)), f"{min(losses):.6f}", f"{max(losses):.6f}"))
    return "## Loss at step 10\n\nOver all layouts of a model, in nats.\n\n" + _table(
        ("model", "layouts", "lowest", "highest"), lines
    )


def _updates(rows: Sequence[UpdateResult]) -> str:
    lines = [(f"`{row.layout}`", row.precision.value, _number(row.difference), _number(row.of_fault)) for row in rows]
    limits = ", ".join(f"{limit:g} in {precision.value}" for precision, limit in cases.UPDATE_TOLERANCES.items())
    what = _paragraph(
        "Under Adam the size of a gradient hardly shows in the weights, so a llama also takes",
        f"{cases.UPDATE_STEPS} clipped steps of SGD. Compared are the updates of all parameters with those of the",
        f"plain loop in fp32. Tolerance: {limits}; half precision rounds its gradients. The last column is the same",
        "with a clip coefficient that is 5 % too large.",
    )
    table = _table(("layout", "precision", "largest difference", "with the fault"), lines)
    return f"## Updates of the weights, by ZeRO stage, precision and offload\n\n{what}\n{table}"


def _faults(rows: Sequence[FaultResult]) -> str:
    lines = [(f"`{row.fault}`", row.model, f"`{row.layout}`", row.what, _number(row.difference)) for row in rows]
    what = _paragraph(
        "Each is planted in the program (`tests/distributed/layout_ranks.py`), which must then differ by more than ten",
        "tolerances.",
    )
    table = _table(("fault", "model", "layout", "what differs most", "by"), lines)
    return f"## Faults that the same comparison finds\n\n{what}\n{table}"


def _paragraph(*parts: str) -> str:
    return textwrap.fill(" ".join(parts), 120, break_long_words=False, break_on_hyphens=False) + "\n"


def _number(value: float | None) -> str:
    if not value:
        return "-" if value is None else "0"
    return "missing" if math.isinf(value) else f"{value:.1e}"


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [list(head)]
    cells.append(["---"] * len(cells[0]))
    return "".join(f"| {' | '.join(row)} |\n" for row in [*cells, *rows])
