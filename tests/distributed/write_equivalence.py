"""`make equivalence`: measure all of `equivalence_cases` and publish the numbers as docs/equivalence.md and .csv.

    python -m tests.distributed.write_equivalence [--folder docs]

Exit code 1, and no file is written, where a layout differs by more than the tolerance or a planted fault goes
unnoticed.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, fields
from functools import partial
from pathlib import Path

from megatron_lite.files import replace_file
from megatron_lite.verify.equivalence import ON_TENSOR_RANKS, TOLERANCE
from tests.distributed import equivalence_cases as cases
from tests.distributed.equivalence_page import CaseResult, FaultResult, Results, UpdateResult, page
from tests.distributed.harness import RankError

CAUGHT = 10 * TOLERANCE
"""A planted fault must cause a larger difference than this, as in test_equivalence.py."""
CAUGHT_UPDATE = 1.5
"""The same for updates, in multiples of the tolerance, as in test_updates.py."""
_TIMEOUT_SECONDS = 600.0  # per case: the machine may be busy


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[2] / "docs")
    folder = parser.parse_args(argv).folder
    results, failures = measure()
    if failures:
        print("nothing was written:", *failures, sep="\n  ", file=sys.stderr)
        return 1
    replace_file(folder / "equivalence.csv", table(results.cases).encode())
    replace_file(folder / "equivalence.md", page(results).encode())
    return 0


def measure() -> tuple[Results, list[str]]:
    """All results, and the errors found in them."""
    results, failures = Results([], [], []), []
    jobs: list[tuple[str, Callable[[], Iterator[str]]]] = []
    for model, layout in cases.CASES:
        jobs.append((f"{model} on {layout}", partial(_case, results, model, layout)))
    for fault, model, layout in cases.MUTATIONS:
        jobs.append((f"{fault} in {model} on {layout}", partial(_fault, results, fault, model, layout)))
    if cases.UPDATE_CASES:
        jobs.append(("updates of the weights", partial(_updates, results)))
    for number, (name, job) in enumerate(jobs, start=1):
        try:
            found = list(job())
        except RankError as error:
            found = [str(error)]
        failures += [f"{name}: {failure}" for failure in found]
        print(f"[{number}/{len(jobs)}] {name}: {'; '.join(found) or 'ok'}", flush=True)
    return results, failures


def _case(results: Results, model: str, layout: str) -> Iterator[str]:
    config = cases.run_config(model, **cases.LAYOUTS[layout])
    traces = cases.traces(config, timeout_seconds=_TIMEOUT_SECONDS)
    found = cases.compared(model, config, traces)
    gradients = _part(found, "gradient of ")
    parameter, gradient = next(iter(gradients.items()))
    norm, loss = (max(_part(found, f"{kind} of step ").values()) for kind in ("grad_norms", "losses"))
    between = max(_part(found, ON_TENSOR_RANKS).values(), default=0.0)
    z_loss = max(_part(found, "z_loss of step ").values(), default=0.0)
    last = traces[0].losses[-1]
    result = CaseResult(
        model, layout, len(traces), len(gradients), gradient, parameter, norm, loss, between, z_loss, last
    )
    results.cases.append(result)
    what, worst = next(iter(found.items()))
    if not worst <= TOLERANCE:  # also when it is NaN
        yield f"{what} differs by {worst:.1e}, more than {TOLERANCE:g}"


def _fault(results: Results, fault: str, model: str, layout: str) -> Iterator[str]:
    config = cases.run_config(model, **cases.LAYOUTS[layout])
    traces = cases.traces(config, cases.MUTATED_STEPS, fault, _TIMEOUT_SECONDS)
    what, difference = next(iter(cases.compared(model, config, traces, cases.MUTATED_STEPS).items()))
    results.faults.append(FaultResult(fault, model, layout, what, difference))
    if not difference > CAUGHT:
        yield f"went unnoticed: {what} differs by {difference:.1e}"


def _updates(results: Results) -> Iterator[str]:
    for (layout, precision), ranks in cases.update_traces().items():
        right, wrong = (next(iter(cases.compared_updates(list(part)).values())) for part in zip(*ranks, strict=True))
        results.updates.append(UpdateResult(layout, precision, right, wrong))
        tolerance = cases.UPDATE_TOLERANCES[precision]
        if not right <= tolerance:
            yield f"{layout} in {precision} differs by {right:.1e}, more than {tolerance:g}"
        if not wrong > CAUGHT_UPDATE * tolerance:
            yield f"{cases.UPDATE_MUTATION} went unnoticed on {layout} in {precision}: {wrong:.1e}"


def _part(found: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): difference for name, difference in found.items() if name.startswith(prefix)}


def table(rows: list[CaseResult]) -> str:
    """All figures of the cases as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(CaseResult)])
    for row in rows:
        writer.writerow([f"{value:.7g}" if isinstance(value, float) else value for value in astuple(row)])
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(main())
