"""Which samples a step of a run was trained on, from the files in its folder. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint.resume import Trained
from megatron_lite.config.frozen import load_frozen
from megatron_lite.config.schema import RunConfig
from megatron_lite.data.samples.skips import Rollback, read_rollbacks, skips_of
from megatron_lite.errors import DataError
from megatron_lite.files import modified_ns
from megatron_lite.observe.lines import blocks, line_type
from megatron_lite.observe.metrics import (
    BEGINNINGS,
    EVENTS_FILE,
    METRICS_FILE,
    ROLLED_BACK_FILE,
    branch_of,
    entries,
    read_metrics,
)
from megatron_lite.optim.batch_ramp import BEGINNING, BatchSchedule, BatchStep, Origin


@dataclass(frozen=True)
class StepSamples:
    """The samples of one version of a step."""

    indices: list[int]
    """Global numbers, in the order of the batch."""
    rollback: int | None
    """Number of the rollback that undid this version, from 1; None = the run kept it."""


def samples_of_step(run_dir: Path, config: RunConfig, step: int) -> StepSamples:
    """The samples of the version of a step that the run kept.

    The windows that rollbacks left out always lie after the samples of earlier steps, so all of them can be applied. A
    batch size that changed at a resume is known only from the next line of metrics.jsonl on.

    Args:
        step: counts from 1.
    Raises:
        DataError: the step is not trained yet, or the run has no such step.
    """
    check_number(step, config)
    rollbacks = read_rollbacks(run_dir)
    last, before = 0, None
    for block in blocks(run_dir / METRICS_FILE, line_type(["samples", "global_batch_size"])):
        for line in block.lines:
            if line.samples is not None and line.global_batch_size is not None:
                last = line.step
                before = line if line.step <= step else before
    batch = _batch(before, config, step)
    indices = skips_of(rollbacks).indices(batch.first_sample, batch.global_batch_size)
    if step >= last + config.train.log_interval:  # steps between two logged lines may have been trained
        raise DataError(
            f"step {step} of {run_dir} is not trained yet: {METRICS_FILE} ends with step {last}; give an earlier one"
            f"{_undone(run_dir, step)}, or --sample {indices[0]} for the first sample that it will read"
        )
    return StepSamples(indices, None)


def rolled_back_samples(run_dir: Path, config: RunConfig, step: int, rollback: int | None) -> StepSamples:
    """The samples of a version of a step that a rollback undid, with the samples that were left out at that time.

    Args:
        rollback: its number, from 1; None = the latest one that undid this step.
    Raises:
        DataError: there is no such version.
    """
    check_number(step, config)
    rollbacks = read_rollbacks(run_dir)
    lines = entries(run_dir / ROLLED_BACK_FILE)
    versions = {_undone_by(line, rollbacks): line for line in lines if line["step"] == step and _has_batch(line)}
    chosen = max(versions, default=0) if rollback is None else rollback
    if chosen not in versions:
        known = f"it was by {_listed('rollback', sorted(versions))}" if versions else _rolled_back_steps(run_dir)
        by = "" if rollback is None else f" by rollback {rollback}"
        raise DataError(
            f"step {step} of {run_dir} was not rolled back{by}: {known}; give another step or rollback, or omit "
            "--rolled-back"
        )
    batch = batch_of_line(versions[chosen]["samples"], versions[chosen]["global_batch_size"])
    skips = skips_of(rollbacks[: branch_of(versions[chosen])])
    return StepSamples(skips.indices(batch.first_sample, batch.global_batch_size), chosen)


def check_number(step: int, config: RunConfig) -> None:
    """
    Raises:
        DataError: there is no step of this number.
    """
    if not 1 <= step <= config.train.steps:
        raise DataError(f"--step {step} is not a step of the run; give one from 1 to train.steps={config.train.steps}")


def config_of(run_dir: Path, step: int | None) -> Path:
    """The frozen configuration of the last attempt that trained a step; without a step, the newest one.

    Raises:
        DataError: the folder is not a run folder.
    """
    there = list(run_dir.glob("config-*.yaml"))
    if not there:
        raise DataError(f"{run_dir} has no config-*.yaml (looked from {Path.cwd()}); give the folder of a run")
    attempts = [event for event in read_metrics(run_dir / EVENTS_FILE) if _is_attempt(event)]
    named = [run_dir / str(event.get("config")) for event in attempts if step is None or event["step"] < step]
    return named[-1] if named and named[-1] in there else max(there, key=modified_ns)


def read_config(run_dir: Path, step: int | None) -> tuple[Path, RunConfig]:
    """The path that `config_of` finds, and the configuration in it."""
    path = config_of(run_dir, step)
    return path, load_frozen(path)


def trained_on(run_dir: Path) -> str | None:
    """The fingerprint of the data that the latest attempt read; None if no attempt has read any."""
    return (_latest_attempt(run_dir) or {}).get("data_fingerprint")


def trained_with(run_dir: Path) -> Trained | None:
    """Configuration and data of the latest attempt; None if there is none, or its configuration is missing.

    Raises:
        ConfigError: this version cannot read the configuration.
    """
    attempt = _latest_attempt(run_dir)
    if attempt is None or "data_fingerprint" not in attempt or not (run_dir / attempt.get("config", "")).is_file():
        return None
    return Trained(load_frozen(run_dir / attempt["config"]), attempt["data_fingerprint"])


def _latest_attempt(run_dir: Path) -> dict[str, Any] | None:
    events = read_metrics(run_dir / EVENTS_FILE)
    return next((event for event in reversed(events) if _is_attempt(event)), None)


def _is_attempt(event: dict[str, Any]) -> bool:
    return event.get("event") in BEGINNINGS


def _batch(before: Any, config: RunConfig, step: int) -> BatchStep:
    """The step's batch: from its own line, or computed from the line before it."""
    if before is None:
        return BatchSchedule(config.train, BEGINNING).at(step - 1)
    if before.step == step:
        return batch_of_line(before.samples, before.global_batch_size)
    return BatchSchedule(config.train, Origin(before.step, before.samples)).at(step - 1)


def batch_of_line(samples: int, global_batch_size: int) -> BatchStep:
    """A line of metrics.jsonl holds the samples that are consumed after its step."""
    return BatchStep(samples - global_batch_size, global_batch_size)


def _has_batch(line: dict[str, Any]) -> bool:
    return all(line.get(name) is not None for name in ("samples", "global_batch_size"))


def _undone_by(line: dict[str, Any], rollbacks: list[Rollback]) -> int:
    """The number of the rollback: the first one after the line's branch that returned to an earlier step."""
    first = branch_of(line)
    later = (number for number, one in enumerate(rollbacks[first:], first + 1) if one.to_step < line["step"])
    return next(later, first + 1)


def _undone(run_dir: Path, step: int) -> str:
    undone = any(line["step"] == step for line in entries(run_dir / ROLLED_BACK_FILE))
    return ", or --rolled-back for the version that a rollback undid" if undone else ""


def _rolled_back_steps(run_dir: Path) -> str:
    steps = {line["step"] for line in entries(run_dir / ROLLED_BACK_FILE)}
    return f"{ROLLED_BACK_FILE} holds steps {min(steps)} to {max(steps)}" if steps else "the run has not rolled back"


def _listed(noun: str, numbers: list[int]) -> str:
    return f"{noun} {' and '.join(map(str, numbers))}"
