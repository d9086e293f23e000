"""`report.html`: a run on a single page that opens from disk without a network connection and can be shared.

Everything from the run folder is untrusted and is escaped: texts of documents may contain HTML.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_lite.files import replace_file, size_text
from megatron_lite.modes import masked
from megatron_lite.observe.charts import chart, from_plotly
from megatron_lite.observe.lines import dropped_text
from megatron_lite.observe.metrics import METRICS_FILE, ROLLBACK_EVENT, ROWS_EVENT, SPIKE_EVENT, branch_of
from megatron_lite.observe.panels import sections
from megatron_lite.observe.phrasing import counted, span
from megatron_lite.observe.progress import duration
from megatron_lite.observe.run_folder import RunFolder
from megatron_lite.observe.spike_view import SpikeView
from megatron_lite.observe.summary import perplexity

REPORT_FILE = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.j2")
MOST_SPIKE_REPORTS = 100
MOST_SAVES = 200
MOST_GAPS = 20
Fact = tuple[str, str]
"""Label and text."""


@dataclass(frozen=True)
class Tile:
    """A headline figure at the top of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Chart:
    identity: str
    title: str
    explanation: str
    figure: str
    """JSON without characters that are special in HTML."""
    is_wide: bool


@dataclass(frozen=True)
class LeftOut:
    """Rows of one data source that yielded no document, for one reason."""

    source: str
    documents: int
    """All documents of the source."""
    kind: str
    count: int
    examples: list[str]


def write_report(run_dir: Path, state: str, out: Path | None = None, run: RunFolder | None = None) -> Path:
    """Read the run folder as it is now and write the page atomically.

    Args:
        state: text that says what the run is doing or how it ended.
        out: None = `report.html` in the run folder.
        run: the folder, if it has already been read.
    Returns:
        the page's path
    Raises:
        OSError: the page cannot be written.
    """
    path = out or run_dir / REPORT_FILE
    page = render(run or RunFolder.read(run_dir), state).encode()
    # The page quotes texts of these files, so it gets no wider permissions than they have.
    with masked([run_dir, *run_dir.glob("spikes/*.json")], path.parent):
        replace_file(path, page)
    return path


def render(run: RunFolder, state: str) -> str:
    """The page as HTML."""
    # Imported late: only the report needs them, and most commands never write one.
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    jinja = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    charts, missing = charts_of(run)
    spikes = run.of_kind(SPIKE_EVENT)
    return jinja.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=run.path.name,
        state=state,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        facts=facts(run),
        tiles=tiles(run),
        notices=_notices(run),
        sections=charts,
        missing=missing,
        plotly=Markup(from_plotly("offline").get_plotlyjs()) if charts else "",
        figures=Markup("[" + ",".join(one.figure for group in charts.values() for one in group) + "]"),
        spike_reports=[SpikeView.of(spike, run.spike_report(spike)) for spike in spikes[-MOST_SPIKE_REPORTS:]],
        older_spikes=max(len(spikes) - MOST_SPIKE_REPORTS, 0),
        rollbacks=run.of_kind(ROLLBACK_EVENT),
        skipped=run.skipped,
        left_out=left_out_rows(run),
        attempts=run.attempts(),
        saves=run.of_kind("save")[-MOST_SAVES:],
        size=size_text,
        counted=counted,
        span=span,
    )


def charts_of(run: RunFolder) -> tuple[dict[str, list[Chart]], list[str]]:
    """The charts of each section, and the titles of panels for which the run has no data."""
    found: dict[str, list[Chart]] = {}
    missing, count = [], 0
    for section, panels in sections().items():
        figures = {panel: chart(run, panel) for panel in panels}
        missing += [panel.title for panel, figure in figures.items() if figure is None]
        drawn = {panel: figure for panel, figure in figures.items() if figure is not None}
        narrow = [panel for panel in drawn if not panel.branches]
        for panel, figure in drawn.items():
            fills_row = len(narrow) % 2 == 1 and panel is narrow[0]  # otherwise the row would have a gap
            identity, is_wide = f"chart-{count}", panel.branches or fills_row
            found.setdefault(section, []).append(
                Chart(identity, panel.title, panel.explanation, _json(figure), is_wide)
            )
            count += 1
    return found, missing


def _json(figure: Any) -> str:
    """The figure for a <script> element: plotly escapes <, > and /, which a test checks."""
    return str(figure.to_json(engine="json"))


def _notices(run: RunFolder) -> list[str]:
    """Notices above the charts: missing, damaged or incomplete data."""
    found, history = [], run.history
    if history.count == 0:
        found.append("No step has been logged yet: there is nothing to draw.")
    elif history.count == 1:
        found.append("One step has been logged so far: curves begin with the second.")
    if history.gaps:
        more = len(history.gaps) - MOST_GAPS
        which = ", ".join(map(str, history.gaps[:MOST_GAPS])) + (f" and {more} more stretches" if more > 0 else "")
        found.append(
            f"{METRICS_FILE} lacks lines that had been written: {which}. The curves have a gap there; training is not "
            "affected."
        )
    elif history.damaged:
        are = "is" if history.damaged == 1 else "are"
        found.append(f"{counted(history.damaged, 'line')} of {METRICS_FILE} cannot be read and {are} left out.")
    if history.dropped:
        found.append(f"{dropped_text(history.dropped, METRICS_FILE)}.")
    return found


def facts(run: RunFolder) -> list[Fact]:
    """Label and text of the facts that describe the run."""
    last = run.history.last
    begin = run.newest("resume") or run.newest("start")
    rows = [
        ("model", _model(run)),
        ("objective", str(run.setting("objective.name") or "")),
        ("data", _data(run, begin)),
        ("layout", _layout(run)),
        ("steps", f"{last.get('step', 0):,} of {run.setting('train.steps') or 0:,}"),
        ("tokens", f"{last['tokens']:,.0f}" if _is_finite(last.get("tokens")) else ""),
        ("versions", _versions(begin)),
        ("run folder", str(run.path)),
    ]
    return [(label, text) for label, text in rows if text]


def _model(run: RunFolder) -> str:
    model = run.setting("model")
    if not isinstance(model, Mapping):
        return ""
    layers = f"{model.get('num_layers')} layers"
    if model.get("num_decoder_layers"):
        layers = f"{model.get('num_layers')} + {model['num_decoder_layers']} layers"
    return f"{model.get('name')}: {layers}, hidden {model.get('hidden_size')}, {model.get('num_attention_heads')} heads"


def _data(run: RunFolder, begin: Mapping[str, Any]) -> str:
    sources = run.setting("data.source")
    names = ", ".join(map(str, sources)) if isinstance(sources, list) else str(sources or "")
    length, batch = run.setting("data.seq_length"), run.setting("train.global_batch_size")
    shape = f"{batch} sequences of {length} tokens a step" if length else ""
    fingerprint = f"fingerprint {begin['data_fingerprint']}" if "data_fingerprint" in begin else ""
    return "; ".join(filter(None, (names, shape, fingerprint)))


def _layout(run: RunFolder) -> str:
    parallel = run.setting("parallel")
    if not isinstance(parallel, Mapping):
        return ""
    sizes = [("DP", "data"), ("TP", "tensor"), ("PP", "pipeline")]
    text = " x ".join(f"{short}{parallel.get(f'{name}_parallel_size')}" for short, name in sizes)
    sequence = ", sequence parallel" if parallel.get("sequence_parallel") else ""
    return f"{text}, ZeRO-{parallel.get('zero_stage')}{sequence}, {run.setting('train.precision')}"


def _versions(begin: Mapping[str, Any]) -> str:
    versions = begin.get("versions")
    return ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else ""


def left_out_rows(run: RunFolder) -> list[LeftOut]:
    """Rows of the corpus that yielded no document, one entry for each source and reason."""
    return [
        LeftOut(str(counts["source"]), counts["documents"], entry["kind"], entry["count"], list(entry["examples"]))
        for counts in run.newest(ROWS_EVENT).get("sources", [])
        for entry in counts["skipped"]
    ]


def tiles(run: RunFolder) -> list[Tile]:
    """The headline figures."""
    rows = [_last_loss(run), _best_validation(run), *_speed(run), _health(run)]
    return [tile for tile in rows if tile is not None]


def _last_loss(run: RunFolder) -> Tile | None:
    first, last = run.history.first, run.history.last
    if not first:
        return None
    return Tile(
        "training loss", _number(last.get("loss")), f"from {_number(first.get('loss'))} at step {first['step']}"
    )


def _best_validation(run: RunFolder) -> Tile | None:
    found = [entry for entry in run.standing("evaluation") if _is_finite(entry.get("validation_loss"))]
    if not found:
        return None
    best = min(found, key=lambda entry: float(entry["validation_loss"]))
    note = f"at step {best['step']:,}"
    if _is_finite(best.get("validation_token_loss")):
        note += f", perplexity {perplexity(best['validation_token_loss']):,.1f}"
    return Tile("best validation loss", _number(best["validation_loss"]), note)


def _speed(run: RunFolder) -> list[Tile]:
    steady = run.history.steady()
    if not len(steady["step_seconds"]):
        return []
    speed = statistics.median(steady["tokens_per_second"].tolist())
    seconds = statistics.median(steady["step_seconds"].tolist())
    left = (run.setting("train.steps") or 0) - run.history.last["step"]
    note = f"{_number(seconds)} s a step" + (f", {duration(left * seconds)} for the rest" if left > 0 else "")
    return [Tile("tokens/s", f"{speed:,.0f}", note), *_utilisation(run, speed)]


def _utilisation(run: RunFolder, speed: float) -> list[Tile]:
    """Model FLOPs utilization with the terms of its formula, if the run has logged them."""
    terms = run.newest("speed_terms")
    if not (_is_finite(terms.get("flops_per_token")) and _is_finite(terms.get("peak_flops"))):
        return []
    flops, peak = float(terms["flops_per_token"]), float(terms["peak_flops"])
    formula = f"{_scaled(flops, 'FLOP/token')} x {speed:,.0f} tokens/s / {_scaled(peak, 'FLOP/s')}"
    return [Tile("MFU", f"{100 * flops * speed / peak:.1f} %", formula)]


def _health(run: RunFolder) -> Tile | None:
    spikes, rollbacks = len(run.of_kind(SPIKE_EVENT)), max(map(branch_of, run.of_kind(ROLLBACK_EVENT)), default=0)
    resumes = len([attempt for attempt in run.attempts() if attempt.kind == "resume"])
    note = f"rollbacks: {rollbacks}, samples left out: {run.num_skipped():,}, resumes: {resumes}"
    return Tile("spikes", str(spikes), note)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "unknown"


def _scaled(value: float, unit: str) -> str:
    """A value with an SI prefix: `2.1 GFLOP/s`."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:,.0f} E{unit}"
