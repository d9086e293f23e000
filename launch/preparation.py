"""What happens before any rank starts: the data is prepared, then the files of the run folder are written."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from launch.base import LaunchPlan
from launch.messages import show_error, show_traceback
from launch.processes import Children, Ending, start
from megatron_lite.config.frozen import freeze, has_trained, unwritable
from megatron_lite.config.resolved import ResolvedConfig
from megatron_lite.data import FOLDER_VARIABLE
from megatron_lite.errors import EXIT_FAILURE, MegatronLiteError, RunFolderInUseError, end_of, memory_error
from megatron_lite.files import make_folder, remove_file, replace_file
from megatron_lite.observe.markers import clear_markers
from megatron_lite.observe.run_lock import Role, RunLock, holder_of, take

PATH_BYTES = 4096  # longest path on Linux


class Preparation:
    """Prepares the data in a child process, so that its threads and memory are gone when it ends."""

    def __init__(self, config: ResolvedConfig, prepare: Prepare) -> None:
        self._answer, answer = os.pipe()
        # its own process group, so that its workers end with it
        self._children = Children([start(lambda: _guarded(prepare, config, answer), own_group=True)], as_groups=True)
        os.close(answer)

    def __enter__(self) -> Preparation:
        return self

    def __exit__(self, *exception: object) -> None:
        self._children.end()
        os.close(self._answer)

    @property
    def failed(self) -> bool:
        """Whether it has already failed; does not wait."""
        self._children.poll()
        return self._children.failed

    def wait(self, ending: Ending) -> int:
        """Exit code: 0, or that of the error which the child has shown. Sets FOLDER_VARIABLE for the ranks."""
        self._children.wait(ending)
        if ending.signal:
            return ending.exit_code
        (end,) = self._children.ends.values()
        if end.status < 0:
            show_error(f"the preparation of the data was killed by signal {-end.status}")
            return 128 - end.status
        folder = os.read(self._answer, PATH_BYTES).decode()
        if folder:
            os.environ[FOLDER_VARIABLE] = folder
        return end.status


Prepare = Callable[[ResolvedConfig], Path | None]
"""Prepares the data of a configuration and returns its folder; None = no data is needed."""


def prepare_data(config: ResolvedConfig) -> Path:
    """Build the shards of a configuration, and report what takes time."""
    return ready_data(config, lambda line: print(line, flush=True))


def ready_data(config: ResolvedConfig, report: Callable[[str], None]) -> Path:
    """The folder of the prepared data of a run that starts or resumes.

    Raises:
        ConfigError, DataError: the data cannot be prepared.
        CheckpointError: the run in train.run_dir was trained on other tokens.
    """
    # takes seconds to import, and only this process needs it
    from megatron_lite.checkpoint.resume import allowed_changes
    from megatron_lite.data.shards.prepare import prepare
    from megatron_lite.train.step_samples import trained_with

    run_dir = config.run_dir
    before = trained_with(run_dir) if has_trained(run_dir) else None
    prepared = prepare(config, report=report, earlier=None if before is None else before.config)
    if before is not None:  # reported before the ranks start; they check the checkpoint themselves
        newest = max((run_dir / "checkpoints").glob("step_*"), default=None)
        allowed_changes(before, config, prepared.fingerprint, f"the run in train.run_dir={run_dir}", newest)
    return prepared.folder


def _guarded(prepare: Prepare, config: ResolvedConfig, answer: int) -> int:
    try:
        folder = prepare(config)
        if folder is not None:
            os.write(answer, str(folder.absolute()).encode())
    except MegatronLiteError as error:
        show_error(error, debug=config.debug)
        return end_of(error)
    except Exception as error:
        explained = memory_error(error)
        if explained is not None:
            show_error(explained, debug=config.debug)
            return end_of(explained)
        show_traceback()
        return EXIT_FAILURE
    return 0


@contextlib.contextmanager
def run_folder(plan: LaunchPlan, ending: Ending | None = None) -> Iterator[Callable[[], None]]:
    """Context manager for the run folder: locked, with the files of the plan and a folder for logs.

    These are the only files that a launcher itself writes. Rank 0 takes over the lock and holds it until it ends. Nodes
    of one job share it: the node of rank 0 locks the folder or, if nodes have no ranks yet, the first node. The
    others write the same files again, in case the folder is not shared.

    Args:
        ending: stops waiting for a holder that may or may not be alive.
    Yields:
        a function that updates the lock's heartbeat; call it repeatedly.
    Raises:
        ConfigError: the folder is not writable.
        RunFolderInUseError: another process uses it.
    """
    try:
        make_folder(plan.error_file.parent)
        lock = _lock(plan, ending)
    except OSError as error:
        raise unwritable(plan.run_dir, error) from error
    try:
        try:
            _write_files(plan, clear=lock is not None)
        except OSError as error:
            raise unwritable(plan.run_dir, error) from error
        yield (lambda: None) if lock is None else lock.beat
    finally:
        if lock is not None:
            lock.release()


def _write_files(plan: LaunchPlan, *, clear: bool) -> None:
    path = freeze(plan.config, plan.run_dir)
    assert path == plan.frozen_config
    for further in set(plan.files) - {path}:
        replace_file(further, plan.files[further].encode())
    if clear:
        remove_file(plan.error_file)
        clear_markers(plan.run_dir)


def _lock(plan: LaunchPlan, ending: Ending | None) -> RunLock | None:
    """Take the lock; None if another node of this job has it, or will take it."""
    if plan.node_rank or _is_shared(plan):
        return None
    try:
        return take(
            plan.run_dir,
            Role.launcher,
            plan.attempt,
            report=lambda line: print(line, file=sys.stderr, flush=True),
            give_up=lambda: ending is not None and ending.signal is not None,
        )
    except RunFolderInUseError:
        if _is_shared(plan):  # nodes start at the same time
            return None
        raise


def _is_shared(plan: LaunchPlan) -> bool:
    holder = holder_of(plan.run_dir) if plan.job else None
    return holder is not None and holder.attempt == plan.attempt
