"""What a run does besides stepping: report, validate, save."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_lite.checkpoint import native
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
        seq_length = trainer.config.data.seq_length
        tokens = record.batch.global_batch_size * seq_length
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
                    "tokens": samples * seq_length,
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
    """Validation loss at intervals and at the end."""

    trackers: Trackers
    progress: Progress

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        interval = trainer.config.train.eval_interval
        if record.step != trainer.config.train.steps and (interval == 0 or record.step % interval):
            return
        loss = trainer.evaluate()
        trainer.summary["validation_loss"] = loss
        self.trackers.event(
            "evaluation", record.step, {"validation_loss": loss, "validation_perplexity": perplexity(loss)}
        )
        self.progress.line(validation_line(record.step, loss, perplexity(loss)))


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
        folder = native.save(
            trainer.engine, self.checkpoints, self.info.at_step(record.step), keep_last=train.keep_last
        )
        self.trackers.event("save", record.step, {"folder": folder.name})
