"""`python -m launch evaluate`: load the weights of a checkpoint under any layout and evaluate them; no training."""

from __future__ import annotations

from pathlib import Path

from megatron_lite.checkpoint.file_plan import shapes_of_all_ranks
from megatron_lite.checkpoint.inspection import is_checkpoint
from megatron_lite.checkpoint.loading import require_complete
from megatron_lite.checkpoint.state import read_state
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.data.shards.prepared import PreparedData
from megatron_lite.engine.build import build_engine
from megatron_lite.engine.engine import Engine, Evaluation
from megatron_lite.engine.hooks import EngineHooks
from megatron_lite.engine.task import Task, build_task
from megatron_lite.errors import RunEnd
from megatron_lite.observe.evaluation import EvaluationReport, report_of
from megatron_lite.observe.heartbeat import Heartbeat, Phase
from megatron_lite.observe.markers import leave_marker
from megatron_lite.observe.run_lock import Claim
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.train import distributed
from megatron_lite.train.checkpoints import layout_of, take_initial_weights, take_weights
from megatron_lite.train.evaluation import HeldOut, evaluate
from megatron_lite.train.rank import started_rank
from megatron_lite.train.stopping import StopAgreement, StopRequested


def evaluate_checkpoint(config: ResolvedConfig, claim: Claim, folder: Path, *, one_pass: bool) -> RunEnd:
    """Run it in every rank; the writing rank leaves an `EvaluationReport` in train.run_dir, which is not the run's own.

    Args:
        config: resolved, with its data prepared. The engine needs an optimizer, so it has one without moments.
        folder: one of our checkpoints, or the folder that model.init_from names.
        one_pass: evaluate on each held-out sample once, instead of train.eval_batches global batches.
    Returns:
        DONE, or PREEMPTED if the ranks were asked to stop.
    Raises:
        MegatronLiteError: anything that the user can fix.
    """
    with started_rank(config, claim) as rank:
        rank.heartbeat.enter(Phase.MEET)
        context, _ = distributed.join(config, rank.device, rank.environment)
        agreement = StopAgreement.of_job(rank.request, context)
        try:
            report = _evaluated(config, context, rank.prepared, folder, one_pass, rank.heartbeat, agreement)
        except StopRequested as stop:
            if context.is_writer:
                leave_marker(rank.folder, RunEnd.PREEMPTED, f"the evaluation was stopped by {stop}")
            return RunEnd.PREEMPTED
        if context.is_writer:
            report.write(rank.folder)
        distributed.leave()
        return RunEnd.DONE


def _evaluated(
    config: ResolvedConfig,
    context: ParallelContext,
    prepared: PreparedData,
    folder: Path,
    one_pass: bool,
    heartbeat: Heartbeat,
    agreement: StopAgreement,
) -> EvaluationReport:
    heartbeat.enter(Phase.BUILD)
    task = build_task(config, context, prepared.vocabulary)
    held_out = (HeldOut.one_pass if one_pass else HeldOut.of_run)(prepared, config, task.objective, context)
    hooks = EngineHooks(between_micro_batches=agreement.at_boundary)
    engine = _engine_with_weights(config, context, task, folder, heartbeat, hooks)
    heartbeat.enter(Phase.EVALUATE)
    agreement.ask()
    found = evaluate(engine, held_out)
    return _report(config, context, folder, held_out.num_samples, found)


def _engine_with_weights(
    config: ResolvedConfig,
    context: ParallelContext,
    task: Task,
    folder: Path,
    heartbeat: Heartbeat,
    hooks: EngineHooks,
) -> Engine:
    first_batch = config.train.global_batch_size
    engine = build_engine(config, context, task, global_batch_size=first_batch, heartbeat=heartbeat, hooks=hooks)
    heartbeat.enter(Phase.LOAD)
    if is_checkpoint(folder):
        require_complete(folder)
        take_weights(engine, folder, read_state(folder))
    else:
        take_initial_weights(engine, shapes_of_all_ranks(engine.shards.shapes()))
    return engine


def _report(
    config: ResolvedConfig, context: ParallelContext, folder: Path, samples: int, found: Evaluation
) -> EvaluationReport:
    separate = config.data.validation_source
    text = f"held-out documents of {_shown(config.data.source)}" if separate is None else _shown(separate)
    return report_of(
        checkpoint=str(folder),
        step=read_state(folder).step if is_checkpoint(folder) else None,
        text=text,
        layout=f"{layout_of(config, context)}, {config.train.precision}",
        samples=samples,
        tokens=found.tokens,
        loss=found.loss,
        token_loss=found.token_loss,
        accuracy=found.accuracy,
        sequence_accuracy=found.sequence_accuracy,
    )


def _shown(source: object) -> str:
    return ", ".join(map(str, source)) if isinstance(source, list) else str(source)
