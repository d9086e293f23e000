"""The summary that a run prints when it ends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megatron_lite.observe.console import Console
from megatron_lite.observe.progress import duration


@dataclass(frozen=True)
class RunSummary:
    """Figures and file paths of a finished run; None and empty strings are not shown. Losses are in nats per token."""

    title: str
    steps: int
    first_loss: float | None = None
    last_loss: float | None = None
    validation_loss: float | None = None
    validation_token_loss: float | None = None  # without the loss of the samples' classes
    validation_accuracy: float | None = None
    sequence_accuracy: float | None = None  # of the samples' classes, e.g. next-sentence prediction
    unigram_label: str = "unigram entropy"
    unigram_entropy_nats: float | None = None  # loss of a model that predicts the labels' frequencies
    unigram_accuracy: float | None = None  # of always predicting the most frequent label
    tokens: int | None = None
    seconds: float | None = None  # of this attempt
    tokens_per_second: float | None = None
    data_wait: float | None = None  # fraction of a step's time that was spent waiting for its batch, 0 .. 1
    model_flops_utilization: float | None = None
    prompt: str = ""
    sample: str = ""  # the text that the model generated after the prompt
    plot: Path | None = None
    report: Path | None = None
    metrics: Path | None = None
    checkpoint: Path | None = None
    logs: Path | None = None
    command: str = ""  # command line that resumes or repeats the run
    note: str = ""  # e.g. that the run was already finished


def show_summary(console: Console, summary: RunSummary) -> None:
    """Print the summary: a panel on a terminal, plain lines elsewhere."""
    if console.is_terminal:
        console.print(summary_panel(summary))
    else:
        console.print(summary_text(summary))


def summary_rows(summary: RunSummary) -> list[tuple[str, str]]:
    """Label and text of every known fact, in display order."""
    rows = [
        ("steps", f"{summary.steps:,}"),
        ("training loss", _training_loss(summary)),
        ("validation loss", _validation_loss(summary)),
        (summary.unigram_label, _unigram(summary)),
        ("accuracy", _accuracy(summary)),
        ("speed", _speed(summary)),
        ("loss curve", _place(summary.plot)),
        ("report", _place(summary.report)),
        ("metrics", _place(summary.metrics)),
        ("checkpoint", _place(summary.checkpoint)),
        ("logs", _place(summary.logs)),
        ("run it again", summary.command),
    ]
    return [(label, text) for label, text in rows if text]


def summary_text(summary: RunSummary) -> str:
    rows = summary_rows(summary)
    width = max(len(label) for label, _ in rows)
    lines = ["", f"== {summary.title} =="]
    if summary.note:
        lines.append(summary.note)
    lines += [f"{label:<{width}}  {text}" for label, text in rows]
    if summary.prompt or summary.sample:
        lines += ["sample", *(f"  | {line}" for line in _shown_sample(summary).splitlines())]
    return "\n".join(lines)


def summary_panel(summary: RunSummary) -> Panel:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(overflow="fold")  # wrap paths and commands instead of truncating them, so they can be copied
    for label, fact in summary_rows(summary):
        table.add_row(label, Text(fact))
    parts: list[RenderableType] = [Text(summary.note, style="yellow")] if summary.note else []
    parts.append(table)
    if summary.prompt or summary.sample:
        text = Text.assemble((_printable(summary.prompt), "bold"), (_printable(summary.sample.rstrip()), "green"))
        parts.append(Panel(text, title="sample", title_align="left", border_style="dim"))
    return Panel(Group(*parts), title=Text(summary.title, style="bold"), title_align="left", border_style="cyan")


def _training_loss(summary: RunSummary) -> str:
    if summary.last_loss is None:
        return ""
    if summary.first_loss is None:
        return f"{summary.last_loss:.3f}"
    return f"{summary.first_loss:.3f} at the first step, {summary.last_loss:.3f} at the last"


def _validation_loss(summary: RunSummary) -> str:
    loss, token_loss = summary.validation_loss, summary.validation_token_loss
    if loss is None or token_loss is None:
        return ""
    of_tokens = "" if summary.sequence_accuracy is None else f", {token_loss:.3f} of tokens alone"
    return f"{loss:.3f}{of_tokens}, perplexity {perplexity(token_loss):,.1f}"


def _accuracy(summary: RunSummary) -> str:
    if summary.validation_accuracy is None:
        return ""
    text = f"{summary.validation_accuracy:.1%} of held-out tokens"
    if summary.unigram_accuracy is not None:
        text += f" ({summary.unigram_accuracy:.1%} by frequency alone)"
    if summary.sequence_accuracy is not None:
        text += f"; {summary.sequence_accuracy:.1%} of next-sentence pairs"
    return text


def _unigram(summary: RunSummary) -> str:
    entropy, loss = summary.unigram_entropy_nats, summary.validation_token_loss
    if entropy is None:
        return ""
    text = f"{entropy:.3f}, perplexity {perplexity(entropy):,.1f}"
    if loss is None or not math.isfinite(loss):
        return text
    return f"{text}: the model is {abs(entropy - loss):.3f} nats {'below' if loss <= entropy else 'above'} it"


def _speed(summary: RunSummary) -> str:
    parts = []
    if summary.tokens_per_second is not None:
        parts.append(f"{summary.tokens_per_second:,.0f} tokens/s")
    if summary.model_flops_utilization is not None:
        parts.append(f"MFU {100 * summary.model_flops_utilization:.1f} %")
    if summary.data_wait is not None:
        parts.append(f"data wait {100 * summary.data_wait:.2g} %")
    if summary.tokens is not None:
        parts.append(f"{summary.tokens:,} tokens")
    if summary.seconds is not None:
        parts.append(duration(summary.seconds))
    return ", ".join(parts)


def _place(path: Path | None) -> str:
    """The path, relative to the working directory if it is inside it: short, and it can be pasted into a shell."""
    if path is None:
        return ""
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def _shown_sample(summary: RunSummary) -> str:
    return _printable(summary.prompt + summary.sample)


def _printable(text: str) -> str:
    """Replace control characters: a model may generate them, and a terminal would interpret them."""
    return "".join(char if char in "\n\t" or char.isprintable() else "\ufffd" for char in text)


def perplexity(loss: float) -> float:
    """exp(loss); infinite if it overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
