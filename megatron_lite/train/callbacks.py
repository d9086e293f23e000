"""What a run does besides stepping: report, validate, save."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_lite.checkpoint import native
from megatron_lite.config.derived import tokens_per_sample
from megatron_lite.observe.heartbeat import Phase
from megatron_lite.observe.progress import Progress, StepFigures, validation_line
from megatron_lite.observe.summary import perplexity
from megatron_lite.observe.throughput import Throughput
from megatron_lite.observe.trackers import Trackers
from megatron_lite.train.loop import StepRecord, Trainer


@dataclass
class Report:
    """Step figures to metrics.jsonl and the other trackers, and to the progress bar."""

    trackers: Trackers
    progress: Progress
    flops_per_token: float
    peak_flops: float  # dense, of all devices of the job together

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        trainer.heartbeat.enter(Phase.REPORT)
        sample_tokens = tokens_per_sample(trainer.config)
        tokens = record.batch.global_batch_size * sample_tokens
        speed = Throughput.of(tokens, record.step_seconds, self.flops_per_token, self.peak_flops)
        if record.step % trainer.config.train.log_interval == 0 or record.step == trainer.config.train.steps:
            samples = record.batch.first_sample + record.batch.global_batch_size
            self.trackers.log(
                record.step,
                {
                    "loss": record.result.loss,
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
                },
            )
        self.progress.update(
            record.step,
            StepFigures(
                record.result.loss, record.result.grad_norm, speed.tokens_per_second, speed.model_flops_utilization
            ),
        )


@dataclass
class Validate:
    """Validation loss and accuracy at intervals and at the end."""

    trackers: Trackers
    progress: Progress

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        interval = trainer.config.train.eval_interval
        if record.step != trainer.config.train.steps and (interval == 0 or record.step % interval):
            return
        found = trainer.evaluate()
        trainer.heartbeat.enter(Phase.REPORT)
        trainer.summary["validation_loss"] = found.loss
        figures = {
            "validation_loss": found.loss,
            "validation_token_loss": found.token_loss,
            "validation_perplexity": perplexity(found.token_loss),
            "validation_accuracy": found.accuracy,
        }
        if found.sequence_accuracy is not None:
            figures["validation_sequence_accuracy"] = found.sequence_accuracy
        self.trackers.event("evaluation", record.step, figures)
        self.progress.line(validation_line(record.step, found.loss, perplexity(found.token_loss), found.accuracy))


@dataclass
class Save:
    """Checkpoints at intervals and at the end."""

    trackers: Trackers
    checkpoints: Path
    info: native.CheckpointInfo  # of step 0

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        train = trainer.config.train
        if record.step != train.steps and (train.save_interval == 0 or record.step % train.save_interval):
            return
        trainer.heartbeat.enter(Phase.SAVE)
        folder = native.save(
            trainer.engine, self.checkpoints, self.info.at_step(record.step), keep_last=train.keep_last
        )
        self.trackers.event("save", record.step, {"folder": folder.name})
