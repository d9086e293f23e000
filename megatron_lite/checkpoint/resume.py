"""What a run restores from a checkpoint, and the report about it. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from megatron_lite.checkpoint.state import CheckpointState, Layout
from megatron_lite.config.changes import DATA_KEYS, Change, Grade, RunPart, grade_changes, refusals, table
from megatron_lite.config.frozen import from_containers
from megatron_lite.config.schema import OptimizerConfig, Precision, RunConfig
from megatron_lite.data.shards.prepared import tokens_of
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.optim.batch_ramp import Origin
from megatron_lite.optim.learning_rate import learning_rate_at
from megatron_lite.optim.moments import moments_of


class Fate(StrEnum):
    restored = "restored"
    resharded = "resharded"  # restored, onto another layout
    reset = "reset"


@dataclass(frozen=True)
class Subsystem:
    """Whether one part of a run's state is restored, resharded or reset."""

    name: str
    fate: Fate
    reason: str

    def __str__(self) -> str:
        return f"{self.name:<11} {self.fate:<10} {self.reason}"


@dataclass(frozen=True)
class ResumeReport:
    """What to load from a checkpoint, and what to report to the user."""

    origin: Origin
    """Where the batch schedule continues."""
    subsystems: tuple[Subsystem, ...]
    changes: tuple[Change, ...]
    load_moments: bool
    """Load the moments and the optimizer's step; otherwise both start from zero."""
    load_loss_scale: bool
    comparable_from: int
    """As of `CheckpointState`, with the changes since."""

    def lines(self) -> list[str]:
        head = f"resuming after step {self.origin.step:,} and {self.origin.samples:,} samples"
        changed = ["changed settings", *(f"  {line}" for line in table(self.changes))] if self.changes else []
        return [head, *(f"  {subsystem}" for subsystem in self.subsystems), *changed]


def describe(
    state: CheckpointState, config: RunConfig, layout: Layout, data_fingerprint: str, folder: Path | None = None
) -> ResumeReport:
    """How a run with this configuration and layout resumes from a checkpoint.

    Args:
        folder: folder of the checkpoint, for messages.
    Raises:
        CheckpointError: a changed setting makes it a different run, so it cannot resume.
    """
    where = "the checkpoint" if folder is None else str(folder)
    try:
        previous = from_containers(state.config)
    except ConfigError as error:
        raise CheckpointError(
            f"{where}: {error}; continue with the version of megatron_lite that wrote it, or start another run in a "
            "new train.run_dir"
        ) from error
    changes = allowed_changes(
        Trained(previous, state.data_fingerprint), without_environment(config), data_fingerprint, where, folder
    )
    load_moments = _keeps_moments(state, config.optimizer)
    load_loss_scale = config.train.precision is Precision.fp16 and state.loss_scale is not None
    moved = [change.key for change in changes if change.moves_losses]
    return ResumeReport(
        origin=Origin(state.step, state.samples),
        subsystems=(
            _weights(state, config, layout),
            _optimizer(state, config.optimizer, layout, load_moments),
            _schedule(state, config, changes),
            _loss_scale(state, config),
            _randomness(config, changes),
            _data(state, config, changes, is_reordered=state.data_fingerprint != data_fingerprint),
            *_spikes(moved),
        ),
        changes=tuple(changes),
        load_moments=load_moments,
        load_loss_scale=load_loss_scale,
        comparable_from=state.step + 1 if moved else state.comparable_from,
    )


@dataclass(frozen=True)
class Trained:
    """The configuration and data that a run, or its checkpoint, was trained with."""

    config: RunConfig
    data_fingerprint: str


def allowed_changes(
    before: Trained, config: RunConfig, data_fingerprint: str, where: str, folder: Path | None
) -> list[Change]:
    """Every changed setting with its grade. Renamed sources are safe if they give the same tokens.

    Args:
        where: what was trained with `before`, for messages.
        folder: folder of a checkpoint, from which a remedy suggests to start another run.
    Raises:
        CheckpointError: a changed setting makes it a different run, so it cannot resume.
    """
    same = same_data(before.data_fingerprint, data_fingerprint)
    changes = grade_changes(before.config, config, folder, same=same)
    refused = refusals(changes, where)
    if not refused and not same:
        refused = [_other_data(before.data_fingerprint, data_fingerprint, where, folder)]
    if refused:
        raise CheckpointError("\n".join(refused))
    return changes


def without_environment(config: RunConfig) -> RunConfig:
    """The configuration as stored in checkpoints, without launcher.environment: it may hold secrets, and people share
    checkpoints."""
    return replace(config, launcher=replace(config.launcher, environment={}))


def same_data(before: str, after: str) -> tuple[str, ...]:
    """The data settings whose result is unchanged; empty if the tokens differ."""
    if tokens_of(before) != tokens_of(after):
        return ()
    return DATA_KEYS if before == after else tuple(key for key in DATA_KEYS if key != "data.weights")


def _other_data(before: str, data_fingerprint: str, where: str, folder: Path | None) -> str:
    weights = "" if folder is None else f" with model.init_from={folder}"
    return (
        f"data.source holds other tokens (fingerprint {data_fingerprint}) than those that {where} was trained on "
        f"({before}), so it is unknown which of them are left to train on; restore the earlier files and "
        f"tokenizer, or start another run in a new train.run_dir{weights}"
    )


def _keeps_moments(state: CheckpointState, optimizer: OptimizerConfig) -> bool:
    return state.optimizer.name == optimizer.name and bool(moments_of(optimizer) and state.optimizer.moments)


def _weights(state: CheckpointState, config: RunConfig, layout: Layout) -> Subsystem:
    precision = config.train.precision
    cast = "" if precision == state.precision else f"; computes in {precision} instead of {state.precision}"
    if layout == state.layout:
        return Subsystem("weights", Fate.restored, f"{layout}{cast}")
    return Subsystem("weights", Fate.resharded, f"{state.layout} -> {layout}{cast}")


def _optimizer(state: CheckpointState, optimizer: OptimizerConfig, layout: Layout, load_moments: bool) -> Subsystem:
    name, stored = "optimizer", state.optimizer
    if stored.name != optimizer.name:
        return Subsystem(name, Fate.reset, f"{stored.name} -> {optimizer.name}: moments start from zero")
    if not moments_of(optimizer):
        return Subsystem(name, Fate.restored, f"{optimizer.name} without momentum has no moments")
    if not load_moments:
        return Subsystem(name, Fate.reset, f"the checkpoint has no moments of {optimizer.name}: they start from zero")
    moments = ", ".join(stored.moments)
    if layout == state.layout:
        return Subsystem(name, Fate.restored, f"{moments} after {stored.step:,} updates")
    return Subsystem(name, Fate.resharded, f"{moments} after {stored.step:,} updates: {state.layout} -> {layout}")


def _schedule(state: CheckpointState, config: RunConfig, changes: Sequence[Change]) -> Subsystem:
    step = state.step + 1
    rate = f"step {step:,} has learning rate {learning_rate_at(step, config.optimizer, config.train.steps):.4g}"
    new = [change.key for change in _resetting(changes) if change.part is RunPart.schedule]
    if new:
        return Subsystem("schedule", Fate.reset, f"new {', '.join(new)}: {rate}")
    return Subsystem("schedule", Fate.restored, rate)


def _loss_scale(state: CheckpointState, config: RunConfig) -> Subsystem:
    name, precision, stored = "loss scale", config.train.precision, state.loss_scale
    if precision is not Precision.fp16:
        if stored is None:
            return Subsystem(name, Fate.restored, f"{precision} has none")
        return Subsystem(name, Fate.reset, f"{stored.scale:,g} is dropped: {precision} needs none")
    if stored is None:
        power = config.train.loss_scale.initial_power
        return Subsystem(name, Fate.reset, f"starts at 2^{power}: {state.precision} had none")
    return Subsystem(name, Fate.restored, f"{stored.scale:,g}, {stored.steps_since_change:,} steps since it changed")


def _randomness(config: RunConfig, changes: Sequence[Change]) -> Subsystem:
    other = [f"{change.key}: {change.consequence}" for change in _resetting(changes) if change.part is RunPart.masks]
    seed = f"seed {config.train.seed}"
    if other:
        return Subsystem("randomness", Fate.reset, f"{seed}; {'; '.join(other)}")
    return Subsystem("randomness", Fate.restored, f"{seed}; masks follow from (seed, sample, layer), nothing is stored")


def _data(state: CheckpointState, config: RunConfig, changes: Sequence[Change], is_reordered: bool) -> Subsystem:
    """`is_reordered`: an earlier version blended the sources in another order, with shares rounded to 1/65,536."""
    position = f"continues with sample {state.samples:,}"
    if any(change.part is RunPart.batches for change in _resetting(changes)):
        ramp = " at the end of the ramp" if config.train.batch_ramp.start else ""
        position += f", in batches of {config.train.global_batch_size}{ramp}"
    if not is_reordered:
        return Subsystem("data", Fate.restored, position)
    return Subsystem(
        "data",
        Fate.reset,
        f"{position}; this version blends the sources in another order: of each source, up to about "
        f"{state.samples // 65_536 + 4:,} samples are repeated or skipped",
    )


def _spikes(moved: Sequence[str]) -> Iterator[Subsystem]:
    """Where steps are no longer judged by those before. `moved`: settings with which losses or gradient norms jump."""
    if moved:
        reason = f"new {', '.join(moved)}: earlier losses and gradient norms are not comparable with later ones"
        yield Subsystem("spikes", Fate.reset, reason)


def _resetting(changes: Sequence[Change]) -> Iterator[Change]:
    return (change for change in changes if change.grade is Grade.resets)
