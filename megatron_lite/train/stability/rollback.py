"""The way back: to a checkpoint before a spike, and past the samples that led in.

What makes it survive a kill at any moment is one file. Once `skipped_samples.json` is on the disk, a checkpoint that
was trained on what it leaves out is passed over by every resume, and every attempt reads past the window. What follows,
this process does or the next: weights, records of the trackers, checkpoints that go. Where the disk is full, the file
waits (`rollback_record.py`): a kill before it is written has the next attempt go back once more.
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
    """Why a run that leaves these samples out cannot go on from a checkpoint; None = it can."""
    made_with = Skips(Window(*window) for window in state.skipped)
    reached = made_with.index(state.samples)
    if skips.before(reached) == made_with.before(reached):
        return None
    return "it was trained on samples that this run has left out since, after a spike"


def next_window(rollbacks: Sequence[Rollback], led_in: Window, batch: int, lead_in_steps: int) -> tuple[Window, int]:
    """What to leave out now, and how many rollbacks in a row have not been enough.

    A spike soon after the place that was jumped over comes from more of the same: each further rollback there leaves
    out twice as many samples beyond it.

    Args:
        led_in: the global samples of the spike's step and of those that led in.
        batch: sequences of a step.
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
class GoBack(Callback):
    """Behind the report, ahead of everything that takes a step for made."""

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
            self._from(trainer, self.watch.spike)

    def _from(self, trainer: Trainer, spike: Spike) -> None:
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
                f"no checkpoint is older than the samples that led in: the update of step {record.step} is dropped, "
                "and nothing else; train.save_interval decides how often there is one, train.keep_last how many stay"
            )
            return
        folder, state = found
        self.checkpoints.go_back(folder, state)
        trainer.rewind(state.step, state.samples, lambda: self._leave_out(trainer, spike, state, led_in))
        self._tell(record, state)

    def _leave_out(self, trainer: Trainer, spike: Spike, state: CheckpointState, led_in: Window) -> Skips:
        """What the run leaves out from here on, made to last. A collective of all ranks."""
        self.watch.go_back(state.step)
        self.validate.forget_after(state.step)
        window = self._with_what_follows(trainer, spike.record, led_in)
        reason = f"{', '.join(spike.judgement.kinds)} at step {spike.record.step}"
        self.record.add(Rollback(window, spike.record.step, state.step, reason))
        self._drop_later(state)
        return self.record.skips

    def _tell(self, record: StepRecord, state: CheckpointState) -> None:
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
        """The samples of the spike's step and of those before it, of an earlier attempt as well."""
        skips, schedule, batch = trainer.source.skips, trainer.schedule, record.batch
        wanted = record.step - 1 - self.settings.lead_in_steps
        known = schedule.at(max(wanted, schedule.first_step))
        unknown = max(schedule.first_step - wanted, 0) * known.global_batch_size  # samples ahead of what it knows
        first = max(known.first_sample - unknown, 0)
        return Window(skips.index(first), skips.index(batch.first_sample + batch.global_batch_size - 1) + 1)

    def _next_window(self, record: StepRecord, led_in: Window) -> tuple[Window, int]:
        return next_window(self.rollbacks, led_in, record.batch.global_batch_size, self.settings.lead_in_steps)

    def _with_what_follows(self, trainer: Trainer, record: StepRecord, led_in: Window) -> Window:
        """With the steps behind the spike that would be one, by the weights gone back to. A collective of all ranks.

        So a long stretch of bad samples costs a rollback and a few forward passes, not a rollback for each step. By
        the weights that the spike came from they would all be bad, if it is those that it has come from.
        """
        skips, stop = trainer.source.skips, led_in.stop
        for step in range(record.step, record.step + self.settings.look_ahead_steps):
            batch = trainer.schedule.at(step)
            micro_batches = trainer.config.num_micro_batches(batch.global_batch_size)
            found = trainer.engine.evaluate(trainer.source.training(batch), micro_batches)
            if not agreed(self.watch.predicts_badly(found.loss)):
                break
            stop = skips.index(batch.first_sample + batch.global_batch_size - 1) + 1
        return self._next_window(record, Window(led_in.first, stop))[0]

    def _checkpoint(self, skips: Skips, first: int, in_a_row: int) -> tuple[Path, CheckpointState] | None:
        """The newest that has read nothing from this sample on; after several rollbacks in vain, one further back."""
        consumed = skips.count(first)
        passed_over = in_a_row // 2

        def reason_against(state: CheckpointState) -> str | None:
            nonlocal passed_over
            if state.samples > consumed:
                return "it is from after the samples that led in"
            if (found := unsuited(skips, state)) is not None:
                return found
            passed_over -= 1
            return "what followed it was a spike again and again" if passed_over >= 0 else None

        found = newest_complete(self.checkpoints.folder, _say_nothing, reason_against, required=False)
        if found is None and in_a_row >= 2:  # none is older
            return self._checkpoint(skips, first, 0)
        return found

    def _drop_later(self, state: CheckpointState) -> None:
        """Checkpoints from behind the one gone back to."""
        if self.is_writer:
            prune(self.checkpoints.folder, self.checkpoints.saver.kept, state.step)


def _say_nothing(line: str) -> None:
    """Of checkpoints that are passed over: the line about the rollback says enough."""


def _listed(skips: Skips) -> str:
    return ", ".join(f"{window.first:,}-{window.stop - 1:,}" for window in skips.windows)
