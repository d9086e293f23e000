"""One run, from its configuration to its summary: connects the packages and holds no logic of its own."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from functools import partial
from typing import TypeVar

import torch.distributed as dist

from megatron_lite.checkpoint.folder import folder_name
from megatron_lite.config.frozen import frozen_path
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.config.schema import Architecture, ObjectiveName
from megatron_lite.data.samples.skips import Skips, skips_of
from megatron_lite.engine.build import build_engine
from megatron_lite.engine.engine import Engine
from megatron_lite.engine.hooks import EngineHooks
from megatron_lite.engine.task import build_task
from megatron_lite.errors import OutOfDataError, RunEnd
from megatron_lite.objectives.base import Example
from megatron_lite.observe.hardware import reuse_freed_memory
from megatron_lite.observe.heartbeat import Phase
from megatron_lite.observe.markers import leave_marker
from megatron_lite.observe.metrics import EVENTS_FILE, ROLLBACK_EVENT, ROWS_EVENT, read_metrics
from megatron_lite.observe.progress import Progress
from megatron_lite.observe.run_lock import Claim
from megatron_lite.observe.trackers import Trackers, build_trackers
from megatron_lite.optim.batch_ramp import BatchSchedule
from megatron_lite.parallel.agreement import agreed
from megatron_lite.train import distributed
from megatron_lite.train.baseline import label_baseline
from megatron_lite.train.callbacks import EVALUATION_EVENT, Save, is_due
from megatron_lite.train.check_init import check_start
from megatron_lite.train.checkpoints import Checkpoints, Start
from megatron_lite.train.finish import ALL_TRAINED, BASELINE_EVENT, RunOutcome, show_outcome
from megatron_lite.train.generate import generate
from megatron_lite.train.loop import Trainer
from megatron_lite.train.parts import Callbacks, Run, agreed_rollbacks, build_callbacks, last_step
from megatron_lite.train.peak import job_peak_flops
from megatron_lite.train.preview import preview
from megatron_lite.train.rank import started_rank
from megatron_lite.train.shard_source import ShardSource
from megatron_lite.train.stability.rollback import unsuited
from megatron_lite.train.stability.watch import UpdateJudge
from megatron_lite.train.startup import measure_links, versions
from megatron_lite.train.stopping import Reason, StopAgreement, StopRequested

T = TypeVar("T")
BASELINE_SAMPLES = 10_000  # of the training set; a tenth as many of the held-out set


def train(config: ResolvedConfig, claim: Claim) -> RunEnd:
    """Train one run in this rank, from the newest checkpoint in its folder if there is one.

    Args:
        config: resolved, with its data prepared.
        claim: the lock of the run folder.
    Returns:
        DONE, or PREEMPTED if the ranks were asked to stop and have saved the last finished step.
    Raises:
        MegatronLiteError: anything that the user can fix.
    """
    started = time.monotonic()
    with started_rank(config, claim) as rank:
        if rank.device.type == "cpu":
            reuse_freed_memory()
        # Before the ranks connect: while the others wait, rank 0 has a core to itself for the measurement.
        world_size = rank.environment.world_size
        peak_flops = job_peak_flops(config, rank.device, world_size) if rank.environment.rank == 0 else math.nan
        rank.heartbeat.enter(Phase.MEET)
        context, nodes = distributed.join(config, rank.device, rank.environment)
        links = measure_links(context, nodes)
        for line in (links.line, *links.warnings):
            rank.console.print(line)
        agreement = StopAgreement.of_job(rank.request, context)
        run = Run(
            config, context, rank.prepared, rank.console, rank.folder, peak_flops, started, rank.heartbeat, links, claim
        )
        end = _attempt(run, agreement)
        distributed.leave()
        return end


def _attempt(run: Run, agreement: StopAgreement) -> RunEnd:
    """Train from the newest checkpoint, or from step 0, to the last step or to a request to stop."""
    run.heartbeat.enter(Phase.LOAD)
    rollbacks = agreed_rollbacks(run)
    skips = skips_of(rollbacks)
    reason_against = partial(unsuited, skips)
    start = Start.find(run.checkpoints, run.config, run.context, run.prepared, run.console, reason_against)
    evaluated = start.folder is None or agreed(run.context.is_writer and _is_evaluated(run, start.step))
    if start.folder and start.step >= run.config.train.steps and evaluated:
        _conclude(run, RunOutcome(start.folder, run.started, done=True))
        return RunEnd.DONE
    schedule = BatchSchedule(run.config.train, start.origin)
    judge = UpdateJudge(run.config)
    engine, source, checkpoints = _build(run, start, schedule, agreement, skips, judge)
    trackers = build_trackers(
        run.config,
        run.folder,
        run.context.is_writer,
        resume_step=start.step,
        rollbacks=len(rollbacks),
        logged=start.state.metrics if start.state else None,
        report=run.console.print,
        guard=run.claim.confirm,
    )
    callbacks: Callbacks | None = None
    try:
        _announce(run, trackers, source, start)
        with _progress(run, start.step) as progress:
            callbacks = build_callbacks(run, trackers, progress, checkpoints, rollbacks, source, judge)
            trainer = Trainer(
                run.config,
                engine,
                source,
                schedule,
                agreement,
                callbacks.watch,
                callbacks.in_order,
                start.step,
                partial(last_step, run, source),
                run.heartbeat,
                reads_late=run.context.device.type == "cuda" and judge.hook is None,
            )
            try:
                agreement.ask()
                if not evaluated:
                    trainer.evaluate(start.step)
                trainer.fit()
            except StopRequested as request:
                return _stop(run, trackers, trainer, callbacks.save, request)
        outcome = _complete(run, trackers, trainer, source)
    finally:
        problem = checkpoints.saver.finish()
        if problem:
            run.console.print(problem)
        trackers.finish(callbacks.validate.summary if callbacks else {})
    _conclude(run, outcome)
    return RunEnd.DONE


def _build(
    run: Run, start: Start, schedule: BatchSchedule, agreement: StopAgreement, skips: Skips, judge: UpdateJudge
) -> tuple[Engine, ShardSource, Checkpoints]:
    """Build the engine with its initial or restored weights, and its data. A collective of all ranks."""
    if start.folder is None:
        check_start(run.config, run.console.print)
    run.heartbeat.enter(Phase.BUILD)
    task = build_task(run.config, run.context, run.prepared.vocabulary)
    source = ShardSource(run.prepared, run.config, task.objective, run.context, skips)
    engine = build_engine(
        run.config,
        run.context,
        task,
        global_batch_size=schedule.at(start.step).global_batch_size,
        heartbeat=run.heartbeat,
        hooks=EngineHooks(between_micro_batches=agreement.at_boundary, before_update=judge.hook),
    )
    run.heartbeat.enter(Phase.LOAD)
    # A run that cannot save must not go on for hours: all ranks stop, and `_stop` reports why.
    give_up = partial(agreement.request, Reason.save)
    checkpoints = Checkpoints.of(
        run.checkpoints, engine, run.prepared, run.console.print, give_up, guard=run.claim.confirm
    )
    checkpoints.begin(start)
    return engine, source, checkpoints


def _complete(run: Run, trackers: Trackers, trainer: Trainer, source: ShardSource) -> RunOutcome:
    """What follows the last step.

    Raises:
        OutOfDataError: the data ended before train.steps.
    """
    _require_data(run, trainer.last_step)
    run.heartbeat.enter(Phase.SAMPLE)
    prompt, sample = _sample(run, trainer.engine, source)
    run.heartbeat.enter(Phase.FINISH)
    _record_baseline(run, trackers, source)
    trackers.event("finish", run.config.train.steps, {"seconds": time.monotonic() - run.started})
    return RunOutcome(run.checkpoints / folder_name(run.config.train.steps), run.started, prompt, sample)


def _stop(run: Run, trackers: Trackers, trainer: Trainer, save: Save, request: StopRequested) -> RunEnd:
    """Save the last finished step unless it is saved already; a collective of all ranks.

    If a folder of that step exists that this attempt did not write, the resume has skipped it as unusable.
    """
    step = trainer.finished_step
    save.wait(trainer)
    if step > save.checkpoints.newest_step and save.is_finite:
        save.at(trainer, step)
        save.wait(trainer)
    trackers.event("stop", step, {"reason": str(request)})
    if run.context.is_writer:
        run.claim.confirm()
        leave_marker(run.folder, RunEnd.PREEMPTED, str(request), step)
        newest = save.checkpoints.newest_step
        kept = f"saved in {run.checkpoints / folder_name(newest)}" if newest else "nothing to save yet"
        if newest < step:
            kept = f"not saved, because its loss was NaN or Inf; the newest checkpoint is of step {newest}"
        run.console.print(f"stopped by {request} after step {step}: {kept}; the same command continues the run")
    return RunEnd.PREEMPTED


def _conclude(run: Run, outcome: RunOutcome) -> None:
    run.heartbeat.enter(Phase.FINISH)
    if run.context.is_writer:
        run.claim.confirm()
        show_outcome(run.config, run.folder, run.console, outcome)
        leave_marker(run.folder, RunEnd.DONE, ALL_TRAINED, run.config.train.steps)


def _require_data(run: Run, last_step: int) -> None:
    if last_step == 0:
        raise OutOfDataError(
            f"data.max_epochs={run.config.data.max_epochs} ends within the first step, and nothing is trained; raise "
            "data.max_epochs, add text in a new train.run_dir, or lower train.global_batch_size"
        )
    if last_step < run.config.train.steps:
        raise OutOfDataError(
            f"data.max_epochs={run.config.data.max_epochs} ends after step {last_step:,} of train.steps="
            f"{run.config.train.steps:,}, which is trained and saved; raise data.max_epochs, add text in a new "
            f"train.run_dir, or set train.steps={last_step}"
        )


def _progress(run: Run, first_step: int) -> Progress:
    return Progress(
        run.console,
        run.config.train.steps,
        first_step=first_step,
        log_interval=run.config.train.log_interval,
        enabled=run.config.tracking.progress and run.context.is_writer,
    )


def _is_evaluated(run: Run, step: int) -> bool:
    """A run may have been stopped in the middle of an evaluation, after the step was saved."""
    train = run.config.train
    if not is_due(step, train.eval_interval, train.steps):
        return True
    evaluated = False
    for event in read_metrics(run.folder / EVENTS_FILE):
        if event.get("event") == EVALUATION_EVENT and event["step"] == step:
            evaluated = True
        elif event.get("event") == ROLLBACK_EVENT and event["to_step"] < step:
            evaluated = False  # the step is trained again after the rollback, with other weights
    return evaluated


def _announce(run: Run, trackers: Trackers, source: ShardSource, start: Start) -> None:
    first_step = start.step
    kind = "resume" if start.report else "start"
    figures = {"data_fingerprint": run.prepared.fingerprint, "world_size": dist.get_world_size()}
    frozen = frozen_path(run.config, run.folder).name
    trackers.event(kind, first_step, figures | {"config": frozen, "versions": versions()})
    trackers.event(ROWS_EVENT, first_step, {"sources": [asdict(counts) for counts in run.prepared.rows]})
    trackers.report_missing_lines(first_step)
    terms = {"flops_per_token": run.flops_per_token, "peak_flops": run.peak_flops}
    trackers.event("speed_terms", first_step, terms)
    trackers.event("links", first_step, run.links.figures)
    for line in start.report.lines() if start.report else ():
        run.console.print(line)
    seconds = time.monotonic() - run.started
    for note in source.notes():
        run.console.print(note)
    run.console.print(
        f"{run.prepared.train_tokens:,} training tokens, {run.prepared.validation_tokens:,} for validation; "
        f"ranks ready after {seconds:.1f} s"
    )


def _sample(run: Run, engine: Engine, source: ShardSource) -> tuple[str, str]:
    """The prompt and the text that the model generates; empty without a tokenizer. A collective of all ranks."""
    train = run.config.train
    tokenizer = run.prepared.open_tokenizer()
    if tokenizer is None or train.generate_tokens == 0:
        return "", ""
    if run.config.model.architecture is not Architecture.decoder:
        return "", preview(engine, _agreed_example(run, source), tokenizer)
    prompt = [*run.prepared.special.begin, *tokenizer.encode(train.generate_prompt)]
    tokens = generate(
        engine,
        prompt,
        num_tokens=train.generate_tokens,
        seq_length=run.config.data.seq_length,
        vocab_size=run.prepared.vocab_size,
        stop_id=run.prepared.eod_id,
    )
    return train.generate_prompt, tokenizer.decode(tokens[len(prompt) :])


def _agreed_example(run: Run, source: ShardSource) -> Example:
    """The first held-out sample, read by the writing rank and sent to all: not every stage reads data."""
    own = next(source.examples(training=False, count=1)) if run.context.is_writer else None
    example = agreed(own)
    assert example is not None
    return example


def _record_baseline(run: Run, trackers: Trackers, source: ShardSource) -> None:
    """Log the unigram baseline; on the writing rank, which is on the first stage and so reads data."""
    if not run.context.is_writer:
        return
    found = label_baseline(
        source.examples(training=True, count=BASELINE_SAMPLES),
        source.examples(training=False, count=BASELINE_SAMPLES // 10),
        run.prepared.vocabulary,
    )
    if run.config.objective.name is ObjectiveName.causal_lm:  # known exactly, over all tokens
        found = replace(found, entropy_nats=run.prepared.unigram_entropy_nats, loss=run.prepared.unigram_entropy_nats)
    trackers.event(BASELINE_EVENT, run.config.train.steps, asdict(found))
