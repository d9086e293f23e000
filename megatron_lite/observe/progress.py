"""The progress bar of a run, or progress lines if the output is not a terminal."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType

from rich.progress import BarColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from megatron_lite.observe.console import Console

_SPEED_WINDOW = 20  # number of steps whose mean duration gives the ETA
_WIDE_COLUMNS = 110  # minimum terminal width for the long form of the figures next to the bar


@dataclass(frozen=True)
class StepFigures:
    """Figures of one step for the progress line; None = not known and not shown."""

    loss: float
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    model_flops_utilization: float | None = None  # fraction of the peak, 0 .. 1


class Progress:
    """A bar on a terminal, a line every `log_interval` steps elsewhere, nothing unless `enabled`.

    Use it as a context manager: on exit, also after an error, it restores the terminal with the cursor on a new line.

    Args:
        first_step: number of steps already done when this attempt starts.
    """

    def __init__(
        self,
        console: Console,
        total_steps: int,
        *,
        first_step: int = 0,
        log_interval: int = 1,
        enabled: bool = True,
    ) -> None:
        self._console = console
        self._total_steps = total_steps
        self._log_interval = max(log_interval, 1)
        self._enabled = enabled and console.rich is not None
        self._eta = _Eta(total_steps, first_step)
        self._bar: RichProgress | None = None
        if self._enabled and console.is_terminal:
            self._bar = RichProgress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=None, table_column=Column(ratio=1)),  # takes the rest of the width
                _Figures(),
                console=console.rich,
                refresh_per_second=4,
                expand=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=first_step, figures="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def update(self, step: int, figures: StepFigures) -> None:
        """Show that step number `step` is done."""
        self._eta.update(step)
        if self._bar is not None:
            compact = self._bar.console.width < _WIDE_COLUMNS
            self._bar.update(self._task, completed=step, figures=figure_text(figures, self._eta.seconds, compact))
        elif self._enabled and (step % self._log_interval == 0 or step == self._total_steps):
            self._console.print(step_line(step, self._total_steps, figures, self._eta.seconds))

    def line(self, text: str) -> None:
        """Print a separate line above the bar, e.g. for a validation or a save."""
        self._console.print(text)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class _Figures(ProgressColumn):
    """Figures of the last step, never wrapped."""

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        return Text(task.fields["figures"], no_wrap=True, overflow="ellipsis")


class _Eta:
    """Time left, estimated from the mean duration of the last steps, including evaluations and saves between them."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._total_steps = total_steps
        self._times: deque[tuple[int, float]] = deque([(first_step, time.monotonic())], maxlen=_SPEED_WINDOW + 1)
        self._known_seconds: float | None = None  # per step; used while the window contains a single step

    def update(self, step: int) -> None:
        now = time.monotonic()
        newest, newest_time = self._times[-1]
        if self._known_seconds is None:  # the first step includes warm-up, so measure from its end
            self._known_seconds = (now - newest_time) / max(step - newest, 1)
            self._times.clear()
        elif step <= newest:  # the run was rolled back
            self._known_seconds = self._seconds_per_step()
            self._times.clear()
        self._times.append((step, now))

    @property
    def seconds(self) -> float | None:
        per_step = self._seconds_per_step()
        return None if per_step is None else per_step * (self._total_steps - self._times[-1][0])

    def _seconds_per_step(self) -> float | None:
        (old_step, old_time), (new_step, new_time) = self._times[0], self._times[-1]
        return (new_time - old_time) / (new_step - old_step) if new_step > old_step else self._known_seconds


def step_line(step: int, total_steps: int, figures: StepFigures, eta_seconds: float | None) -> str:
    """`step 10/300 | loss 8.123 | grad norm 1.20 | 12,345 tokens/s | MFU 12.3 % | ETA 0:04:10`"""
    return f"step {step}/{total_steps} | {figure_text(figures, eta_seconds)}"


def figure_text(figures: StepFigures, eta_seconds: float | None, compact: bool = False) -> str:
    """The known figures; the `compact` form fits into 80 columns together with the step."""
    parts = [f"loss {figures.loss:.3f}"]
    if figures.grad_norm is not None:
        parts.append(f"{'grad' if compact else 'grad norm'} {figures.grad_norm:.2f}")
    if figures.tokens_per_second is not None:
        parts.append(f"{figures.tokens_per_second:,.0f} {'tok/s' if compact else 'tokens/s'}")
    if figures.model_flops_utilization is not None:
        parts.append(f"MFU {100 * figures.model_flops_utilization:.1f} %")
    if eta_seconds is not None:
        parts.append(f"ETA {duration(eta_seconds)}")
    return ("  " if compact else " | ").join(parts)


def validation_line(step: int, loss: float, perplexity: float, accuracy: float) -> str:
    """`validation at step 100 | loss 5.123 | perplexity 167.8 | accuracy 12.3 %`"""
    return (
        f"validation at step {step} | loss {loss:.3f} | perplexity {perplexity:,.1f} | accuracy {100 * accuracy:.1f} %"
    )


def duration(seconds: float) -> str:
    """`0:04:10`, or `2 days, 0:04:10`."""
    hours, rest = divmod(round(max(seconds, 0.0)), 3600)
    minutes, seconds_left = divmod(rest, 60)
    days, hours = divmod(hours, 24)
    days_text = f"{days} day{'s' if days > 1 else ''}, " if days else ""
    return f"{days_text}{hours}:{minutes:02d}:{seconds_left:02d}"
