"""Checks every step for spikes, and writes a spike report while the samples and gradients are still at hand."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import Precision
from megatron_lite.config.stability import OnSpike, StabilityConfig
from megatron_lite.data.samples.skips import Rollback
from megatron_lite.engine.engine import Engine
from megatron_lite.engine.gradient_norms import sequence_losses, stage_memory_bytes
from megatron_lite.engine.hooks import PendingUpdate
from megatron_lite.observe.heartbeat import Heartbeat, Phase
from megatron_lite.observe.metrics import METRICS_FILE, newest_entries
from megatron_lite.observe.spikes import Judgement, SpikeDetector, SpikeKind, StepStatistics
from megatron_lite.parallel.topology import bubble_share
from megatron_lite.train.loop import BatchSource, Findings, StepRecord
from megatron_lite.train.stability.spike_report import SpikeReport, SpikeReports

NEEDED = {"step", "loss", "grad_norm", "loss_scale", "skipped"}  # fields of a line of metrics.jsonl
STEPS_AFTER = 2  # steps after a spike whose figures are added to its report
SHARES = {
    "share_data": (Phase.DATA,),
    "share_compute": (Phase.FORWARD, Phase.BACKWARD),
    "share_pipeline": (Phase.SEND, Phase.RECEIVE),
    "share_reduce": (Phase.REDUCE,),
    "share_optimizer": (Phase.OPTIMIZER,),
}


@dataclass(frozen=True)
class Spike:
    """The record of a spike's step, and why it is a spike."""

    record: StepRecord
    judgement: Judgement


class UpdateJudge:
    """Judges a step before its update if `stability.on_spike` acts on spikes: the engine's `before_update` hook.

    All ranks must decide the same, or their collectives no longer match; so the decision uses all-reduced figures only.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        self.detector = SpikeDetector(config.stability)
        self._acts = config.stability.on_spike is not OnSpike.warn
        self._is_fp16 = config.train.precision is Precision.fp16
        self._judged: tuple[StepStatistics, Judgement] | None = None

    @property
    def hook(self) -> Callable[[PendingUpdate], bool] | None:
        """For `EngineHooks.before_update`; None if spikes are only reported: then no step waits for a judgement."""
        return self.judge if self._acts else None

    def judge(self, update: PendingUpdate) -> bool:
        """Whether to skip the update of the current step."""
        overflowed = self._is_fp16 and not math.isfinite(update.grad_norm)
        statistics = StepStatistics(0, update.loss, update.grad_norm, update.loss_scale, overflowed)
        self._judged = statistics, self.detector.judge(statistics)
        return self._judged[1].is_spike

    def take(self) -> tuple[StepStatistics, Judgement] | None:
        """The judgement of the step that has just ended, and forget it; None = the hook was not called."""
        judged, self._judged = self._judged, None
        return judged


class Watch:
    """The observer of the steps: its findings are logged in the step's line, and the callbacks act on them.

    A step that was not judged before its update is judged after it, by the step's result.

    Args:
        judge: its hook is the one that the engine was built with.
        source: the training samples.
        spike_reports: None on all but the writing rank.
        rollbacks: of the run so far; `RollbackCallback` appends to the same list.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        engine: Engine,
        judge: UpdateJudge,
        source: BatchSource,
        heartbeat: Heartbeat,
        spike_reports: SpikeReports | None,
        rollbacks: Sequence[Rollback],
    ) -> None:
        self._config, self._source, self._heartbeat = config, source, heartbeat
        self._settings: StabilityConfig = config.stability
        self._is_fp16 = config.train.precision is Precision.fp16
        self._engine, self._judge, self._spike_reports = engine, judge, spike_reports
        self.detector = judge.detector
        self._rollbacks = rollbacks
        self.spike: Spike | None = None
        """The last step, if it was a spike."""
        self._open: list[SpikeReport] = []  # reports that wait for the figures of the steps after the spike
        self._history: deque[StepStatistics] = deque(maxlen=steps_kept(config))

    def observe(self, record: StepRecord) -> Findings:
        """A collective of all ranks."""
        statistics, judgement = self._judgement(record)
        before, self.spike = self.spike, Spike(record, judgement) if judgement.is_spike else None
        self.detector.add(statistics, judgement)
        self._history.append(statistics)
        step_shares = shares(record)
        self._heartbeat.enter(Phase.REPORT)
        layers = self._layer_figures() if self._settings.measures_layers(record.step) else None
        if self._open and record.step == self._open[0].step + STEPS_AFTER:
            self._add_steps_after(self._open.pop(0), record.newer)
        if self.spike and needs_report(self.spike, before):
            self._open.append(self._write_down(self.spike))
        micro_batches = self._config.num_micro_batches(record.batch.global_batch_size)
        return Findings(
            spike=judgement.is_spike,
            ideal_bubble=bubble_share(self._engine.context.pipeline_size, micro_batches),
            shares=step_shares,
            rollbacks=len(self._rollbacks),
            layers=layers,
        )

    def would_be_spike(self, loss: float) -> bool:
        """Whether a batch with this loss, before any update, would be a spike."""
        judgement = self.detector.judge(StepStatistics(0, loss, 0.0))
        return SpikeKind.loss in judgement.kinds or SpikeKind.not_finite in judgement.kinds

    def replay(self, history: Iterable[StepStatistics]) -> None:
        """Feed the detector the steps of an earlier attempt, so that it knows what is usual."""
        self._history.extend(history)
        self.detector.replay(self._history)

    def rewind(self, step: int) -> None:
        """Forget the steps after this one: they are trained again."""
        self.spike = None
        self._open.clear()
        kept = [statistics for statistics in self._history if statistics.step <= step]
        self._history.clear()
        self.replay(kept)
        self._engine.meter.forget()

    def _judgement(self, record: StepRecord) -> tuple[StepStatistics, Judgement]:
        result = record.result
        if (found := self._judge.take()) is not None:
            judged, judgement = found
            return StepStatistics(
                record.step, judged.loss, judged.grad_norm, result.loss_scale, judged.overflowed
            ), judgement
        overflowed = self._is_fp16 and result.skipped
        statistics = StepStatistics(record.step, result.loss, result.grad_norm, result.loss_scale, overflowed)
        return statistics, self.detector.judge(statistics)

    def _layer_figures(self) -> dict[str, Any]:
        """A collective of all ranks."""
        layers = self._engine.meter.figures()
        return {
            "layer_grad_norm": layers.grad_norm,
            "layer_update_ratio": layers.update_ratio,
            "stage_memory_bytes": stage_memory_bytes(self._engine.context),
        }

    def _write_down(self, spike: Spike) -> SpikeReport:
        """A collective of all ranks."""
        record, engine = spike.record, self._engine
        print(f"judged step {record.step} a spike: {spike.judgement}", flush=True)  # to each rank's own log
        batch = record.batch
        spike_report = SpikeReport(
            record,
            spike.judgement,
            str(self._settings.on_spike),
            len(self._rollbacks),
            self._source.skips.indices(batch.first_sample, batch.global_batch_size),
            sequence_losses(record.sequences, engine.context, batch.global_batch_size),
            engine.meter.recent_grad_norms(record.step, record.newer),
        )
        if self._spike_reports is not None:
            self._spike_reports.open(spike_report)
        return spike_report

    def _add_steps_after(self, spike_report: SpikeReport, newer: int) -> None:
        if self._spike_reports is not None:
            last = spike_report.step + STEPS_AFTER
            spike_report.layer_grad_norm.update(self._engine.meter.recent_grad_norms(last, newer))
            self._spike_reports.write(spike_report)


def needs_report(spike: Spike, before: Spike | None) -> bool:
    """Of consecutive spikes, only the first is reported, and the first whose loss or gradient norm is NaN or Inf: the
    others are consequences of it.

    Args:
        before: the step just before, if it was a spike.
    """
    return before is None or SpikeKind.not_finite in set(spike.judgement.kinds) - set(before.judgement.kinds)


def shares(record: StepRecord) -> dict[str, float]:
    """Shares of a step's time on this rank, as its training thread sees it: on a GPU, the time to launch kernels and to
    wait for them."""
    return {
        name: sum(record.spent.get(phase, 0.0) for phase in phases) / record.step_seconds
        for name, phases in SHARES.items()
    }


def steps_kept(config: ResolvedConfig) -> int:
    """How many steps of statistics to keep: enough for a full window before the last checkpoint, where a rollback may
    return to."""
    return 2 * (config.stability.window + config.train.save_interval)


def logged_statistics(config: ResolvedConfig, run_dir: Path, step: int, first: int = 1) -> list[StepStatistics]:
    """Statistics of the latest steps up to this one, as far as metrics.jsonl has them.

    Args:
        first: the earliest step that is comparable with the steps to come.
    """
    earlier = (row for row in newest_entries(run_dir / METRICS_FILE) if row.keys() >= NEEDED and row["step"] <= step)
    comparable = takewhile(lambda row: row["step"] >= first, earlier)
    rows = list(islice(comparable, steps_kept(config)))
    return [_statistics_of(row, config.train.precision) for row in reversed(rows)]


def _statistics_of(row: dict[str, Any], precision: Precision) -> StepStatistics:
    """Statistics from a line of metrics.jsonl; it may be from an attempt with another precision."""
    is_fp16 = precision is Precision.fp16
    overflowed = is_fp16 and row["skipped"] and not row.get("spike")
    return StepStatistics(row["step"], row["loss"], row["grad_norm"], row["loss_scale"] if is_fp16 else 1.0, overflowed)
