"""What a run does besides training steps: report, watch for divergence, validate, save."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_lite.engine.engine import Evaluation
from megatron_lite.errors import DivergedError
from megatron_lite.observe.heartbeat import Phase
from megatron_lite.observe.progress import Progress, StepFigures, validation_line
from megatron_lite.observe.summary import perplexity
from megatron_lite.observe.throughput import Throughput
from megatron_lite.observe.trackers import Trackers
from megatron_lite.train.checkpoints import Checkpoints
from megatron_lite.train.loop import Callback, Findings, StepRecord, Trainer, is_due
from megatron_lite.train.stability.rollback_record import RollbackRecord

EVALUATION_EVENT = "evaluation"


@dataclass
class Report(Callback):
    """Logs the figures of each step to metrics.jsonl and the other trackers, and updates the progress bar."""

    trackers: Trackers
    progress: Progress
    flops_per_token: float
    peak_flops: float  # dense FLOP/s of all devices of the job together

    def after_step(self, trainer: Trainer, record: StepRecord, findings: Findings) -> None:
        trainer.heartbeat.enter(Phase.REPORT)
        sample_tokens = trainer.config.tokens_per_sample
        tokens = record.batch.global_batch_size * sample_tokens
        speed = Throughput.of(tokens, record.step_seconds, self.flops_per_token, self.peak_flops)
        if record.step % trainer.config.train.log_interval == 0 or record.step == trainer.last_step:
            samples = record.batch.first_sample + record.batch.global_batch_size
            self.trackers.log(
                record.step,
                {
                    "loss": record.result.loss,
                    "token_loss": record.result.token_loss,
                    **record.result.measures,
                    "grad_norm": record.result.grad_norm,
                    "learning_rate": record.learning_rate,
                    "samples": samples,
                    "tokens": samples * sample_tokens,
                    "global_batch_size": record.batch.global_batch_size,
                    "tokens_per_second": speed.tokens_per_second,
                    "model_flops_utilization": speed.model_flops_utilization,
                    "step_seconds": record.step_seconds,
                    "data_seconds": record.data_seconds,
                    "loss_scale": record.result.loss_scale,
                    "skipped": record.result.skipped,
                    **findings.figures(),
                },
            )
        self.progress.update(
            record.step,
            StepFigures(
                record.result.loss, record.result.grad_norm, speed.tokens_per_second, speed.model_flops_utilization
            ),
        )


@dataclass
class Validate(Callback):
    """Measures validation loss, perplexity and accuracy at intervals and at the end."""

    trackers: Trackers
    progress: Progress
    newest: tuple[int, float] | None = None
    """Step and loss of the last validation of this attempt."""

    def after_step(self, trainer: Trainer, record: StepRecord, findings: Findings) -> None:
        if is_due(record.step, trainer.config.train.eval_interval, trainer.last_step):
            trainer.evaluate(record.step)

    def found_finite(self, step: int) -> bool:
        """Whether the model was validated after exactly this step, and its loss was finite."""
        return self.newest is not None and self.newest[0] == step and math.isfinite(self.newest[1])

    def forget_after(self, step: int) -> None:
        """Forget a validation after this step, to which the run is rolled back."""
        if self.newest and self.newest[0] > step:
            self.newest = None

    @property
    def summary(self) -> dict[str, float]:
        """For the trackers at the end of the run."""
        return {} if self.newest is None else {"validation_loss": self.newest[1]}

    def after_evaluation(self, trainer: Trainer, step: int, found: Evaluation) -> None:
        trainer.heartbeat.enter(Phase.REPORT)
        self.newest = (step, found.loss)
        figures = {
            "validation_loss": found.loss,
            "validation_token_loss": found.token_loss,
            "validation_perplexity": perplexity(found.token_loss),
            "validation_accuracy": found.accuracy,
        }
        if found.sequence_accuracy is not None:
            figures["validation_sequence_accuracy"] = found.sequence_accuracy
        self.trackers.event(EVALUATION_EVENT, step, figures)
        self.progress.line(validation_line(step, found.loss, perplexity(found.token_loss), found.accuracy))


@dataclass
class Guard(Callback):
    """Ends a run whose loss stays NaN or Inf, before it wastes a night. Comes after `Validate`: if the update of the
    last step was skipped, only the validation can show that the weights are finite."""

    validate: Validate
    non_finite_steps: int = 0  # in a row

    def after_step(self, trainer: Trainer, record: StepRecord, findings: Findings) -> None:
        self.non_finite_steps = 0 if record.is_finite else self.non_finite_steps + 1
        limit = trainer.config.train.max_non_finite_steps
        ends_non_finite = record.step == trainer.last_step and not self.validate.found_finite(record.step)
        if self.non_finite_steps >= limit or (self.non_finite_steps and ends_non_finite):
            first = record.step - self.non_finite_steps + 1
            raise DivergedError(
                f"diverged: loss {record.result.loss:g} and gradient norm {record.result.grad_norm:g} at step "
                f"{record.step}, NaN or Inf since step {first} (train.max_non_finite_steps={limit}); the last "
                "checkpoint is from before: use a lower optimizer.learning_rate, more optimizer.warmup_steps or "
                "train.precision=fp32 in a new train.run_dir"
            )


@dataclass
class Save(Callback):
    """Saves checkpoints at intervals and at the end, never of weights that may be NaN or Inf."""

    trackers: Trackers
    checkpoints: Checkpoints
    validate: Validate
    rollbacks: RollbackRecord
    is_finite: bool = True
    """Whether the weights are known to be finite: after a step with a NaN or Inf loss they may not be."""

    def after_step(self, trainer: Trainer, record: StepRecord, findings: Findings) -> None:
        self.report()
        self.is_finite = record.is_finite or self.validate.found_finite(record.step)
        if self.is_finite and is_due(record.step, trainer.config.train.save_interval, trainer.last_step):
            self.at(trainer, record.step)

    def at(self, trainer: Trainer, step: int) -> None:
        """Save now, as the checkpoint of this step."""
        trainer.heartbeat.enter(Phase.SAVE)
        self.rollbacks.require_written()
        validated = self.validate.newest
        loss = validated[1] if validated and validated[0] == step else None
        first_sample = trainer.schedule.at(step).first_sample
        self.checkpoints.save(step, first_sample, trainer.source.skips, loss, self.trackers.logged(step))
        self.report()

    def at_end(self, trainer: Trainer) -> None:
        self.wait(trainer)

    def wait(self, trainer: Trainer) -> None:
        """Wait until the last checkpoint is complete."""
        trainer.heartbeat.enter(Phase.SAVE)
        self.checkpoints.saver.wait()
        self.report()

    def report(self) -> None:
        """Log the saves that have completed since the last call."""
        while self.checkpoints.saver.reports:
            done = self.checkpoints.saver.reports.pop(0)
            self.trackers.event(
                "save",
                done.step,
                {
                    "folder": done.folder.name,
                    "stall_seconds": done.stall_seconds,
                    "total_seconds": done.total_seconds,
                    "bytes": done.bytes,
                },
            )
