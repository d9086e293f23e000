"""Weights & Biases: one wandb run per run folder, kept through all resumes."""

from __future__ import annotations

import netrc
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb

from megatron_lite.errors import ConfigError, DamagedFileError
from megatron_lite.files import make_folder, replace_file, set_aside_others
from megatron_lite.observe.credentials import without_secrets
from megatron_lite.observe.metrics import BEGINNINGS, ROLLBACK_EVENT, ROLLBACKS, SPIKE_EVENT, branch_of, with_branches
from megatron_lite.observe.numeric import numbers
from megatron_lite.observe.wandb_record import alerts, history
from megatron_lite.state_files import read_text, warn

RUN_ID = re.compile(r"[\w-]{1,64}", re.ASCII)
OF_ATTEMPTS = (*BEGINNINGS, "stop", "finish")  # events of an attempt: logged by each attempt, even at the same step
OF_LINES = ("event", "step", "time")  # fields of metrics.jsonl and events.jsonl that are not figures


class WandbTracker:
    """Logs to the wandb run whose id is stored in `<run>/wandb/run-id`. Every step is logged exactly once.

    wandb drops a row whose built-in step is not greater than the last one (wandb issues 4482, 9449). So `step` is
    logged as an ordinary value here, and used as the x-axis of every chart. A run that resumes from a checkpoint
    repeats the steps after it bit for bit: rows that wandb already has are not logged again. Rows that were lost
    because wandb's process was killed together with the ranks are logged later (`catch_up`).

    Steps that come again after a rollback are not repetitions: they use other samples. Every row therefore has the
    number of `rollbacks` before it (its branch), and each branch has every step once.

    Args:
        mode: `auto` (online if the user is logged in, otherwise offline), `offline` or `online`.
        rollbacks: number of rollbacks in the run so far.
    Raises:
        ConfigError: online without an API key; wandb would prompt for one and block.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        mode: str,
        project: str,
        name: str,
        config: Mapping[str, Any],
        rollbacks: int = 0,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        mode = resolve_mode(mode, os.environ)
        arguments: dict[str, Any] = {
            "project": project,
            "name": name,
            "id": run_id(run_dir),
            "dir": str(run_dir),
            "config": without_secrets(config),
        }
        try:
            self._run = _start(mode, arguments)
        except Exception as error:  # wandb raises many types, also for its network and its service process
            if mode == "offline":
                raise
            report(f"wandb is not available ({error}); logging offline, `wandb sync` sends it later")
            mode = "offline"
            self._run = _start(mode, arguments)
        self._logged = _logged_steps(run_dir)
        self._alerted = {(alert.title, alert.text) for alert in alerts(run_dir, run_id(run_dir))}
        self._rollbacks = rollbacks
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        report(f"wandb: {self._run.url}" if mode == "online" else f"wandb: offline, in {run_dir / 'wandb'}")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._add("train", step, self._rollbacks, values)

    def event(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._add(kind, step, self._branch(kind, values), values)

    def alert(self, title: str, text: str) -> None:
        """Send an alert once, even if a resume repeats the step; wandb forwards it as the user has set up there."""
        if (title, text) not in self._alerted:
            self._run.alert(title=title, text=text, level="WARN")
            self._alerted.add((title, text))

    def rewind(self, step: int, rollbacks: int) -> None:
        self._rollbacks = rollbacks

    def catch_up(self, metrics: Iterable[dict[str, Any]], events: Iterable[dict[str, Any]]) -> None:
        """Log the rows of earlier attempts that wandb lacks.

        Args:
            metrics: lines of `rolled_back.jsonl` and `metrics.jsonl`.
            events: lines of `events.jsonl`.
        """
        rows = [("train", branch_of(entry), entry) for entry in metrics]
        told = with_branches(event for event in events if "event" in event)
        rows += [(entry["event"], branch, entry) for branch, entry in told if entry["event"] not in OF_ATTEMPTS]
        for kind, rollbacks, entry in rows:
            figures = {name: entry[name] for name in entry if name not in OF_LINES}
            self._add(kind, entry["step"], rollbacks, figures)
            self._logged.add((kind, entry["step"], rollbacks))  # two attempts may have logged the same event
            if kind == SPIKE_EVENT:
                self.alert(str(entry.get("title", "")), str(entry.get("text", "")))

    def _branch(self, kind: str, values: Mapping[str, Any]) -> int:
        """The branch of an event. A rollback belongs to the branch that it starts."""
        return branch_of(values) if kind == ROLLBACK_EVENT else self._rollbacks

    def _add(self, kind: str, step: int, rollbacks: int, values: Mapping[str, Any]) -> None:
        figures = {f"{kind}/{name}": value for name, value in numbers(values).items()}
        if figures and (kind in OF_ATTEMPTS or (kind, step, rollbacks) not in self._logged):
            self._run.log({**figures, "step": step, ROLLBACKS: rollbacks})

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(without_secrets(summary))
        self._run.finish()


def resolve_mode(mode: str, environment: Mapping[str, str]) -> str:
    """`online` or `offline` for a tracking.wandb setting; under `auto`, WANDB_MODE has priority, e.g. `disabled`."""
    if mode == "auto":
        return environment.get("WANDB_MODE") or ("online" if has_api_key(environment) else "offline")
    if mode == "online" and not has_api_key(environment):
        raise ConfigError(
            "tracking.wandb=online needs an API key; run `wandb login`, set WANDB_API_KEY, or use tracking.wandb=auto"
        )
    return mode


def has_api_key(environment: Mapping[str, str]) -> bool:
    """Whether wandb would find an API key: in WANDB_API_KEY, or in the netrc file for its host. The key is not kept."""
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    home = Path(environment.get("HOME", "~")).expanduser()
    for path in (environment.get("NETRC"), home / ".netrc", home / "_netrc"):
        try:
            if path and Path(path).is_file() and netrc.netrc(str(path)).authenticators(host):
                return True
        except (netrc.NetrcParseError, OSError):
            continue  # wandb could not read this file either
    return False


def run_id(run_dir: Path) -> str:
    """The wandb run id of this run folder, created on first use."""
    path = run_dir / "wandb" / "run-id"
    try:
        stored = (read_text(path) or "").strip()
        if RUN_ID.fullmatch(stored):
            return stored
        if stored:
            warn(f"{path} is damaged: it holds no id of a run; wandb gets a new run")
    except DamagedFileError as error:
        warn(f"{error}; wandb gets a new run")
    new = secrets.token_hex(4)
    make_folder(path.parent)
    set_aside_others(path)
    replace_file(path, (new + "\n").encode())
    return new


def _logged_steps(run_dir: Path) -> set[tuple[str, int, int]]:
    """(kind, step, rollbacks) of each row that earlier attempts have logged to wandb."""
    rows = history(run_dir, run_id(run_dir))
    return {(name.partition("/")[0], row["step"], branch_of(row)) for row in rows for name in row if "/" in name}


def _start(mode: str, arguments: dict[str, Any]) -> Any:
    # Console capture is off because console output and logs must not be uploaded. No metadata, because it contains
    # SLURM_* and other variables, the command line and the host. In offline mode `resume` only causes a warning.
    settings = wandb.Settings(console="off", save_code=False, disable_git=True, init_timeout=30, x_disable_meta=True)
    resume = "allow" if mode == "online" else None
    return wandb.init(**{**arguments, "mode": mode, "resume": resume, "settings": settings})
