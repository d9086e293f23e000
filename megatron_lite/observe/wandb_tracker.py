"""Weights & Biases: one run for the life of a run folder, through every resume."""

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
OF_ATTEMPTS = (*BEGINNINGS, "stop", "finish")  # events of each attempt, not of a step that may be repeated
OF_LINES = ("event", "step", "time")  # what lines of metrics.jsonl and events.jsonl have besides figures


class WandbTracker:
    """Logs to the wandb run whose id is kept in `<run>/wandb/run-id`.

    wandb drops a row whose own step counter is not above the last one (wandb issues 4482, 9449). Here `step` is an
    ordinary value, made the axis of every chart. A run that resumes from a checkpoint repeats the steps behind it, bit
    for bit: what the run's record has already is not logged again. What it lost, because wandb's own process was killed
    with the ranks, is logged late (`catch_up`). So it holds every step once.

    After a rollback steps come again that are no repetition: their samples are other ones. Every row says by how many
    `rollbacks` it comes after, and the record holds every step of each such branch once.

    Args:
        mode: `auto` (online when the user is logged in, offline otherwise), `offline` or `online`.
        rollbacks: of the run so far.
    Raises:
        ConfigError: online without an API key; wandb would wait for one on the keyboard.
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
        except Exception as error:  # of wandb, its network and its service
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
        """Told once, whatever a resume repeats; wandb sends a mail or a message as the user has set it up there."""
        if (title, text) not in self._alerted:
            self._run.alert(title=title, text=text, level="WARN")
            self._alerted.add((title, text))

    def rewind(self, step: int, rollbacks: int) -> None:
        self._rollbacks = rollbacks

    def catch_up(self, metrics: Iterable[dict[str, Any]], events: Iterable[dict[str, Any]]) -> None:
        """Log what `rolled_back.jsonl`, `metrics.jsonl` and `events.jsonl` hold of earlier attempts and the record has
        not."""
        rows = [("train", branch_of(entry), entry) for entry in metrics]
        told = with_branches(event for event in events if "event" in event)
        rows += [(entry["event"], branch, entry) for branch, entry in told if entry["event"] not in OF_ATTEMPTS]
        for kind, rollbacks, entry in rows:
            figures = {name: entry[name] for name in entry if name not in OF_LINES}
            self._add(kind, entry["step"], rollbacks, figures)
            self._logged.add((kind, entry["step"], rollbacks))  # an event may be told twice, by two attempts
            if kind == SPIKE_EVENT:
                self.alert(str(entry.get("title", "")), str(entry.get("text", "")))

    def _branch(self, kind: str, values: Mapping[str, Any]) -> int:
        """A rollback begins the branch that it leads to."""
        return branch_of(values) if kind == ROLLBACK_EVENT else self._rollbacks

    def _add(self, kind: str, step: int, rollbacks: int, values: Mapping[str, Any]) -> None:
        figures = {f"{kind}/{name}": value for name, value in numbers(values).items()}
        if figures and (kind in OF_ATTEMPTS or (kind, step, rollbacks) not in self._logged):
            self._run.log({**figures, "step": step, ROLLBACKS: rollbacks})

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._run.summary.update(without_secrets(summary))
        self._run.finish()


def resolve_mode(mode: str, environment: Mapping[str, str]) -> str:
    """`online` or `offline` (`disabled` too when WANDB_MODE says so) for a tracking.wandb setting."""
    if mode == "auto":
        return environment.get("WANDB_MODE") or ("online" if has_api_key(environment) else "offline")
    if mode == "online" and not has_api_key(environment):
        raise ConfigError(
            "tracking.wandb=online needs an API key; run `wandb login`, set WANDB_API_KEY, or use tracking.wandb=auto"
        )
    return mode


def has_api_key(environment: Mapping[str, str]) -> bool:
    """Whether wandb would find a key: in WANDB_API_KEY, or for its host in the netrc file. The key is not read out."""
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    home = Path(environment.get("HOME", "~")).expanduser()
    for path in (environment.get("NETRC"), home / ".netrc", home / "_netrc"):
        try:
            if path and Path(path).is_file() and netrc.netrc(str(path)).authenticators(host):
                return True
        except (netrc.NetrcParseError, OSError):
            continue  # a file that wandb could not read either
    return False


def run_id(run_dir: Path) -> str:
    """The wandb id of this run folder, made on first use."""
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
    """(kind, step, rollbacks) of each row that earlier attempts have logged."""
    rows = history(run_dir, run_id(run_dir))
    return {(name.partition("/")[0], row["step"], branch_of(row)) for row in rows for name in row if "/" in name}


def _start(mode: str, arguments: dict[str, Any]) -> Any:
    # Console capture off: our console and logs are not for upload. No metadata: it holds variables such as SLURM_*,
    # the command line and the host. Offline, `resume` would only draw a warning.
    settings = wandb.Settings(console="off", save_code=False, disable_git=True, init_timeout=30, x_disable_meta=True)
    resume = "allow" if mode == "online" else None
    return wandb.init(**{**arguments, "mode": mode, "resume": resume, "settings": settings})
