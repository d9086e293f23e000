"""The rollbacks of a run and their file, `skipped_samples.json`, even if the disk is full for a while."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lite.data.samples.skips import Rollback, Skips, skips_of, write_rollbacks
from megatron_lite.errors import DISK_ERRNOS, DiskError, TrainingError
from megatron_lite.observe.metrics import SKIPS_FILE
from megatron_lite.parallel.agreement import agreed


@dataclass
class RollbackRecord:
    """Every rollback of a run; later attempts read it and leave the same samples out.

    A full disk does not end training: the record stays in memory until it can be written. If the process dies before
    that, the next attempt resumes from the checkpoint that this one rolled back to, reaches the spike and rolls back
    again. So no checkpoint may be saved before the record is written: it would have been trained without samples that,
    as far as the next attempt knows, are not left out, and so be skipped.
    """

    run_dir: Path
    is_writer: bool
    report: Callable[[str], None]
    rollbacks: list[Rollback] = field(default_factory=list)
    _is_waiting: bool = False
    """On the writing rank: the file lacks the newest rollback."""

    @property
    def skips(self) -> Skips:
        return skips_of(self.rollbacks)

    def add(self, rollback: Rollback) -> None:
        """A collective of all ranks.

        Raises:
            TrainingError: the system does not let us write the file; on every rank alike.
        """
        self.rollbacks.append(rollback)
        problem: TrainingError | None = None
        if self.is_writer:
            try:
                self._write()
            except OSError as error:
                if error.errno in DISK_ERRNOS:
                    self._wait(error)
                else:
                    problem = TrainingError(
                        f"{self._path} cannot be written ({error}), and a rollback needs it; fix its permissions and "
                        "run the same command again: it reaches the spike and rolls back again"
                    )
        problem = agreed(problem)
        if problem is not None:
            raise problem

    def try_again(self) -> None:
        """Write an unwritten record, if there is space now; on the writing rank only, not a collective."""
        if self._is_waiting:
            try:
                self._write()
            except OSError:
                return
            self.report(f"{self._path} is written; checkpoints can be saved again")

    def require_written(self) -> None:
        """Call it before saving a checkpoint. A collective of all ranks.

        Raises:
            DiskError: the disk is still full; on every rank alike.
        """
        if not self.rollbacks:
            return
        self.try_again()
        problem: DiskError | None = None
        if self._is_waiting:
            problem = DiskError(
                f"{self._path} cannot be written, and a checkpoint after a rollback needs it; free space on its disk, "
                "then run the same command: it resumes from the last checkpoint, reaches the spike and rolls back again"
            )
        problem = agreed(problem)
        if problem is not None:
            raise problem

    @property
    def _path(self) -> Path:
        return self.run_dir / SKIPS_FILE

    def _write(self) -> None:
        write_rollbacks(self.run_dir, self.rollbacks)
        self._is_waiting = False

    def _wait(self, error: OSError) -> None:
        self._is_waiting = True
        self.report(
            f"warning: {self._path} cannot be written ({error.strerror or error}); training goes on, and the file is "
            "written before the next checkpoint"
        )
