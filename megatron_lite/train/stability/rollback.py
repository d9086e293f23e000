"""Rollbacks: return to a checkpoint before a spike and skip the samples that led to it.

One file makes a rollback survive a kill at any moment: `skipped_samples.json`. Once it is on disk, every resume skips
checkpoints that were trained on the samples that it lists, and every attempt leaves these samples out. Everything else
(weights, tracker records, removal of later checkpoints) can be done by this process or by the next attempt. If the disk
is full, the file is written later (`rollback_record.py`): after a kill before that, the next attempt rolls back again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lite.checkpoint.loading import newest_complete
from megatron_lite.checkpoint.retention import prune
from megatron_lite.checkpoint.state import CheckpointState
from megatron_lite.config.stability import OnSpike, StabilityConfig
from megatron_lite.data.samples.skips import Rollback, Skips, Window
from megatron_lite.errors import DivergedError
from megatron_lite.observe.console import Console
from megatron_lite.observe.heartbeat import Phase
from megatron_lite.observe.metrics import ROLLBACK_EVENT
from megatron_lite.observe.trackers import Trackers
from megatron_lite.parallel.agreement import agreed
from megatron_lite.train.callbacks import Save, Validate
from megatron_lite.train.checkpoints import Checkpoints
from megatron_lite.train.loop import Callback, Findings, StepRecord, Trainer
from megatron_lite.train.stability.rollback_record import RollbackRecord
from megatron_lite.train.stability.watch import Spike, Watch


def unsuited(skips: Skips, state: CheckpointState) -> str | None:
    """Why a run that leaves these samples out cannot resume from a checkpoint; None = it can."""
    made_with = Skips(Window(*window) for window in state.skipped)
    reached = made_with.index(state.samples)
    if skips.before(reached) == made_with.before(reached):
        return None
    return "it was trained on samples that this run has left out since, after a spike"


def next_window(rollbacks: Sequence[Rollback], led_in: Window, batch: int, lead_in_steps: int) -> tuple[Window, int]:
    """The samples to leave out now, and how many earlier rollbacks in a row were not enough.

    A spike soon after samples that were left out has the same cause: each further rollback there leaves out twice as
    many samples beyond them.

    Args:
        led_in: the global samples of the spike's step and of the steps that led to it.
        batch: sequences per step.
    """
    in_a_row, first = 0, led_in.first
    near = (lead_in_steps + 2) * batch
    for earlier in reversed(rollbacks):
        if not earlier.window.first - near <= first <= earlier.window.stop + near:
            break
        in_a_row += 1
        first = earlier.window.first
    beyond = (2**in_a_row - 1) * batch
    return Window(led_in.first, led_in.stop + beyond), in_a_row


@dataclass
class RollbackCallback(Callback):
    """Rolls the run back after a spike. Comes after `Report` and before every callback that relies on the step."""

    settings: StabilityConfig
    run_dir: Path
    is_writer: bool
    watch: Watch
    checkpoints: Checkpoints
    save: Save
    validate: Validate
    trackers: Trackers
    console: Console
    record: RollbackRecord

    @property
    def rollbacks(self) -> list[Rollback]:
        return self.record.rollbacks

    def after_step(self, trainer: Trainer, record: StepRecord, findings: Findings) -> None:
        self.record.try_again()
        if self.settings.on_spike is OnSpike.rollback and self.watch.spike is not None:
            self._roll_back(trainer, self.watch.spike)

    def _roll_back(self, trainer: Trainer, spike: Spike) -> None:
        """A collective of all ranks."""
        record = spike.record
        if len(self.rollbacks) >= self.settings.max_rollbacks:
            raise DivergedError(
                f"diverged: a spike at step {record.step}, and all stability.max_rollbacks="
                f"{self.settings.max_rollbacks} rollbacks of this run are used up (they left out samples "
                f"{_listed(self.record.skips)}); read the spike reports in {self.run_dir / 'spikes'}, then go on "
                "with a lower optimizer.learning_rate in a new train.run_dir, or raise stability.max_rollbacks"
            )
        trainer.heartbeat.enter(Phase.LOAD)
        skips, led_in = trainer.source.skips, self._led_in(trainer, record)
        self.save.wait(trainer)
        found = self._checkpoint(skips, led_in.first, self._next_window(record, led_in)[1])
        if found is None:
            self.console.print(
                f"no checkpoint is older than the samples that led to the spike: only the update of step {record.step} "
                "is skipped; train.save_interval sets how often one is saved, train.keep_last how many are kept"
            )
            return
        folder, state = found
        self.checkpoints.restore_earlier(folder, state)
        trainer.rewind(state.step, state.samples, lambda: self._leave_out(trainer, spike, state, led_in))
        self._report(record, state)

    def _leave_out(self, trainer: Trainer, spike: Spike, state: CheckpointState, led_in: Window) -> Skips:
        """Record the samples to leave out from here on, on disk as well. A collective of all ranks."""
        self.watch.rewind(state.step)
        self.validate.forget_after(state.step)
        window = self._with_what_follows(trainer, spike.record, led_in)
        reason = f"{', '.join(spike.judgement.kinds)} at step {spike.record.step}"
        self.record.add(Rollback(window, spike.record.step, state.step, reason))
        self._drop_later(state)
        return self.record.skips

    def _report(self, record: StepRecord, state: CheckpointState) -> None:
        window = self.rollbacks[-1].window
        text = (
            f"rollback {len(self.rollbacks)} of {self.settings.max_rollbacks}: back to step {state.step}, without "
            f"samples {window.first:,} to {window.stop - 1:,}"
        )
        self.trackers.event(
            ROLLBACK_EVENT,
            record.step,
            {
                "to_step": state.step,
                "first_sample": window.first,
                "stop_sample": window.stop,
                "rollbacks": len(self.rollbacks),
                "text": text,
            },
        )
        self.trackers.rewind(state.step, len(self.rollbacks))
        print(text, flush=True)  # to each rank's own log
        self.console.print(text)

    def _led_in(self, trainer: Trainer, record: StepRecord) -> Window:
        """The samples of the spike's step and of those that led to it, including steps of earlier attempts."""
        skips, schedule, batch = trainer.source.skips, trainer.schedule, record.batch
        wanted = record.step - 1 - self.settings.lead_in_steps
        known = schedule.at(max(wanted, schedule.first_step))
        # The schedule starts at the resumed step; for steps before it, assume the same batch size.
        unknown = max(schedule.first_step - wanted, 0) * known.global_batch_size
        first = max(known.first_sample - unknown, 0)
        return Window(skips.index(first), skips.index(batch.first_sample + batch.global_batch_size - 1) + 1)

    def _next_window(self, record: StepRecord, led_in: Window) -> tuple[Window, int]:
        return next_window(self.rollbacks, led_in, record.batch.global_batch_size, self.settings.lead_in_steps)

    def _with_what_follows(self, trainer: Trainer, record: StepRecord, led_in: Window) -> Window:
        """Add the following steps whose loss, under the restored weights, would be a spike. A collective of all ranks.

        So a long run of bad samples costs one rollback and a few forward passes, not a rollback for each step. The
        weights of the spike itself may be the cause of it; every batch could look bad under them.
        """
        skips, stop = trainer.source.skips, led_in.stop
        for step in range(record.step, record.step + self.settings.look_ahead_steps):
            batch = trainer.schedule.at(step)
            micro_batches = trainer.config.num_micro_batches(batch.global_batch_size)
            found = trainer.engine.evaluate(trainer.source.training(batch), micro_batches)
            if not agreed(self.watch.would_be_spike(found.loss)):
                break
            stop = skips.index(batch.first_sample + batch.global_batch_size - 1) + 1
        return self._next_window(record, Window(led_in.first, stop))[0]

    def _checkpoint(self, skips: Skips, first: int, in_a_row: int) -> tuple[Path, CheckpointState] | None:
        """The newest checkpoint that was trained only on samples before this one; after several failed rollbacks, an
        earlier one."""
        consumed = skips.count(first)
        passed_over = in_a_row // 2

        def reason_against(state: CheckpointState) -> str | None:
            nonlocal passed_over
            if state.samples > consumed:
                return "it is from after the samples that led to the spike"
            if (found := unsuited(skips, state)) is not None:
                return found
            passed_over -= 1
            return "several rollbacks to it were followed by a spike" if passed_over >= 0 else None

        found = newest_complete(self.checkpoints.folder, _say_nothing, reason_against, required=False)
        if found is None and in_a_row >= 2:  # none is older
            return self._checkpoint(skips, first, 0)
        return found

    def _drop_later(self, state: CheckpointState) -> None:
        """Remove the checkpoints after the restored one."""
        if self.is_writer:
            prune(self.checkpoints.folder, self.checkpoints.saver.kept, state.step)


def _say_nothing(line: str) -> None:
    """No line for each skipped checkpoint: the line about the rollback says enough."""


def _listed(skips: Skips) -> str:
    return ", ".join(f"{window.first:,}-{window.stop - 1:,}" for window in skips.windows)
