"""docs/equivalence.md: no case is missing, and it is published only if all layouts are equal."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.verify.equivalence import TOLERANCE, Trace, trace_twin
from tests.distributed import equivalence_cases as cases
from tests.distributed import write_equivalence

DOCS = Path(__file__).parents[2] / "docs"
REMEDY = "run `make equivalence`"


def test_the_published_page_has_every_case() -> None:
    page = (DOCS / "equivalence.md").read_text()
    with (DOCS / "equivalence.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["layout"]) for row in rows] == cases.CASES, REMEDY
    assert all(float(row[kind]) <= TOLERANCE for row in rows for kind in ("gradient", "gradient_norm", "loss"))
    for layout in cases.LAYOUTS:
        assert f"\n| `{layout}` | " in page, REMEDY
    for family, models in cases.FAMILIES.items():
        assert f"\n- {family}: {', '.join(models)}\n" in page, REMEDY
    for fault, model, layout in cases.MUTATIONS:
        assert f"\n| `{fault}` | {model} | `{layout}` | " in page, REMEDY
    for layout, precision in cases.UPDATE_CASES:
        assert f"\n| `{layout}` | {precision.value} | " in page, REMEDY


def test_every_model_has_one_family() -> None:
    assert sorted(model for models in cases.FAMILIES.values() for model in models) == sorted(cases.MODELS)


@pytest.mark.parametrize("wrong", [None, "loss", "fault"])
def test_what_differs_is_not_published(wrong: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One layout differs, and one planted fault changes nothing."""

    def one_rank(*arguments: Any, **_: object) -> list[Trace]:
        config, vocab_size, num_steps, mutation = arguments[2:]
        trace = trace_twin(config, vocab_size, num_steps)
        if mutation is None:
            factor = 1.0 + 2 * TOLERANCE if wrong == "loss" else 1.0
        else:
            factor = 1.0 if wrong == "fault" else 2.0
        return [replace(trace, losses=[loss * factor for loss in trace.losses], updates={})]

    monkeypatch.setattr(cases, "run_ranks", one_rank)
    monkeypatch.setattr(cases, "CASES", [("gpt2", "dp2")])
    monkeypatch.setattr(cases, "MUTATIONS", [("tied_gradient_doubled", "gpt2", "pp2")])
    monkeypatch.setattr(cases, "UPDATE_CASES", [])
    code = write_equivalence.main(["--folder", str(tmp_path)])
    written = sorted(path.name for path in tmp_path.iterdir())
    assert (code, written) == ((1, []) if wrong else (0, ["equivalence.csv", "equivalence.md"]))
    assert wrong or "\n| `tied_gradient_doubled` | gpt2 | `pp2` | " in (tmp_path / "equivalence.md").read_text()
