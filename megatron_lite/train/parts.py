"""The parts of an attempt at a run besides its engine: callbacks, rollbacks so far, last step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.data.samples.skips import Rollback, rollbacks_to_go_on_with
from megatron_lite.data.shards.prepared import PreparedData
from megatron_lite.errors import DataError
from megatron_lite.observe.console import Console
from megatron_lite.observe.heartbeat import Heartbeat
from megatron_lite.observe.progress import Progress
from megatron_lite.observe.run_lock import Claim
from megatron_lite.observe.spikes import StepStatistics
from megatron_lite.observe.trackers import Trackers
from megatron_lite.optim.batch_ramp import BatchSchedule
from megatron_lite.parallel.agreement import agreed
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.planning.flops import flops_of_run
from megatron_lite.train.callbacks import Guard, Report, Save, Validate
from megatron_lite.train.checkpoints import Checkpoints
from megatron_lite.train.loop import Callback
from megatron_lite.train.shard_source import ShardSource
from megatron_lite.train.stability.rollback import RollbackCallback
from megatron_lite.train.stability.rollback_record import RollbackRecord
from megatron_lite.train.stability.spike_report import SpikeReports
from megatron_lite.train.stability.watch import UpdateJudge, Watch, logged_statistics
from megatron_lite.train.startup import Links


@dataclass(frozen=True)
class Run:
    """What every part of an attempt needs."""

    config: ResolvedConfig
    context: ParallelContext
    prepared: PreparedData
    console: Console
    folder: Path
    peak_flops: float  # dense FLOP/s of the whole job; NaN on all but the writing rank
    started: float  # time.monotonic()
    heartbeat: Heartbeat
    links: Links
    claim: Claim

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @cached_property
    def flops_per_token(self) -> float:
        """FLOPs of training per token, without recomputation."""
        return flops_of_run(self.config, self.prepared.vocab_size).training


@dataclass(frozen=True)
class Callbacks:
    watch: Watch
    report: Report
    rollback: RollbackCallback
    validate: Validate
    guard: Guard
    save: Save

    @property
    def in_order(self) -> list[Callback]:
        return [self.report, self.rollback, self.validate, self.guard, self.save]


def build_callbacks(
    run: Run,
    trackers: Trackers,
    progress: Progress,
    checkpoints: Checkpoints,
    rollbacks: list[Rollback],
    source: ShardSource,
    judge: UpdateJudge,
) -> Callbacks:
    """Build them after the run's weights are loaded. A collective of all ranks."""
    config = run.config
    validate = Validate(trackers, progress)
    record = RollbackRecord(run.folder, run.context.is_writer, run.console.print, rollbacks)
    save = Save(trackers, checkpoints, validate, record)
    spike_reports = _spike_reports(run, trackers, source)
    watch = Watch(config, checkpoints.engine, judge, source, run.heartbeat, spike_reports, rollbacks)
    watch.replay(_earlier_steps(run, checkpoints))
    rollback = RollbackCallback(
        config.stability,
        run.folder,
        run.context.is_writer,
        watch,
        checkpoints,
        save,
        validate,
        trackers,
        run.console,
        record,
    )
    return Callbacks(
        watch,
        Report(trackers, progress, run.flops_per_token, run.peak_flops),
        rollback,
        validate,
        Guard(validate),
        save,
    )


def _spike_reports(run: Run, trackers: Trackers, source: ShardSource) -> SpikeReports | None:
    if not run.context.is_writer:
        return None
    return SpikeReports(run.folder, source.provenance(), trackers, run.console, run.config.stability.worst_sequences)


def agreed_rollbacks(run: Run) -> list[Rollback]:
    """The rollbacks of the run so far. A collective of all ranks.

    Raises:
        DataError: the file that lists them is damaged; on every rank alike.
    """
    found, problem = list[Rollback](), None
    try:
        found = rollbacks_to_go_on_with(run.folder) if run.context.is_writer else []
    except DataError as error:
        problem = str(error)
    found, problem = agreed((found, problem))
    if problem is not None:
        raise DataError(problem)
    return found


def _earlier_steps(run: Run, checkpoints: Checkpoints) -> list[StepStatistics]:
    """Statistics of the steps of earlier attempts, so that this attempt detects the spikes that they would have.

    Steps from before a setting changed that moves losses or gradient norms are left out: else the steps after the
    change would be taken for spikes.
    """
    step, first = checkpoints.newest_step, checkpoints.comparable_from
    return agreed(logged_statistics(run.config, run.folder, step, first) if run.context.is_writer else [])


def last_step(run: Run, source: ShardSource, schedule: BatchSchedule) -> int:
    """train.steps, or fewer if data.max_epochs passes over the data end before; a collective of all ranks."""
    steps, epochs = run.config.train.steps, run.config.data.max_epochs
    if epochs is None:
        return steps
    within = schedule.steps_within(source.samples_in(epochs)) if run.context.is_writer else steps
    return min(steps, agreed(within))
