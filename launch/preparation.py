"""What happens before any rank starts: the data is made ready, then the run folder gets its files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from launch.base import LaunchPlan
from launch.messages import show_error
from launch.processes import POLL_SECONDS, Children, Ending, start
from megatron_lite.config.derived import run_directory
from megatron_lite.config.frozen import freeze, has_trained, unwritable
from megatron_lite.config.schema import RunConfig
from megatron_lite.data import FOLDER_VARIABLE
from megatron_lite.errors import EXIT_FAILURE, EXIT_USER_ERROR, LaunchError, MegatronLiteError
from megatron_lite.observe.markers import clear_markers

LOCK_FILE = ".lock"
OWNER_SECONDS = 10.0  # that a launcher may take from its claim to its name in the file, seen from another machine
PATH_BYTES = 4096  # longest path of Linux


class Preparation:
    """The corpus on its way to shards, in a child process: its threads and its memory end with it."""

    def __init__(self, config: RunConfig, prepare: Prepare) -> None:
        self._answer, answer = os.pipe()
        # a group of its own, so that its worker processes end with it
        self._children = Children([start(lambda: _guarded(prepare, config, answer), own_group=True)], as_groups=True)
        os.close(answer)

    def __enter__(self) -> Preparation:
        return self

    def __exit__(self, *exception: object) -> None:
        self._children.end()
        os.close(self._answer)

    @property
    def failed(self) -> bool:
        """Whether it has already ended badly; does not wait."""
        self._children.poll()
        return self._children.failed

    def wait(self, ending: Ending) -> int:
        """Exit code: 0, or that of the error which the child has shown. Ranks find the data by the environment."""
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


Prepare = Callable[[RunConfig], Path | None]
"""Makes the data of a configuration ready and says where it lies; None = none is needed."""


def prepare_data(config: RunConfig) -> Path:
    """Make the shards of a configuration, saying what takes time."""
    return ready_data(config, lambda line: print(line, flush=True))


def ready_data(config: RunConfig, report: Callable[[str], None]) -> Path:
    """The folder of the prepared data of a run that begins or goes on.

    Raises:
        ConfigError, DataError: it cannot be made.
        CheckpointError: the run in train.run_dir was trained on other tokens.
    """
    # seconds of imports that only this process needs
    from megatron_lite.checkpoint.resume import allowed_changes
    from megatron_lite.data.prepare import prepare
    from megatron_lite.train.step_samples import trained_with

    run_dir = run_directory(config)
    before = trained_with(run_dir) if has_trained(run_dir) else None
    prepared = prepare(config, report=report, earlier=None if before is None else before.config)
    if before is not None:  # said before the ranks start; they look at the checkpoint itself
        newest = max((run_dir / "checkpoints").glob("step_*"), default=None)
        allowed_changes(before, config, prepared.fingerprint, f"the run in train.run_dir={run_dir}", newest)
    return prepared.folder


def _guarded(prepare: Prepare, config: RunConfig, answer: int) -> int:
    try:
        folder = prepare(config)
        if folder is not None:
            os.write(answer, str(folder.absolute()).encode())
    except MegatronLiteError as error:
        show_error(error, debug=config.debug)
        return EXIT_USER_ERROR
    except Exception:
        traceback.print_exc(file=sys.stderr)
        return EXIT_FAILURE
    return 0


@contextlib.contextmanager
def run_folder(plan: LaunchPlan) -> Iterator[None]:
    """The run folder for the length of the block: ours alone, with the files of the plan and room for logs.

    These are the only writes of a launcher itself. Forked ranks share the claim, so it ends with the last of them.
    Nodes of one job share it, too: that of rank 0 claims it or, where they have no ranks yet, the first one. The others
    write the same files again, in case the folder is not the same.

    Raises:
        ConfigError: the folder cannot be written.
        LaunchError: another launcher is at work in it.
    """
    try:
        plan.error_file.parent.mkdir(parents=True, exist_ok=True)
        lock = (plan.run_dir / LOCK_FILE).open("a+")
    except OSError as error:
        raise unwritable(plan.run_dir, error) from error
    with lock:
        claimed = not plan.node_rank and _claim(lock, plan)
        path = freeze(plan.config, plan.run_dir)
        assert path == plan.frozen_config
        for further in set(plan.files) - {path}:
            further.write_text(plan.files[further])
        if claimed:
            plan.error_file.unlink(missing_ok=True)
            clear_markers(plan.run_dir)
        yield


def _claim(lock: IO[str], plan: LaunchPlan) -> bool:
    """Take the folder, or find that it belongs to another node of this job."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if plan.job and _owned_by_job(plan):
            return False
        owner = _read_owner(plan)[0]
        raise LaunchError(
            f"train.run_dir={plan.run_dir} is in use by process {owner}; wait for it, or give another folder"
        ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n{plan.job}")
    lock.flush()
    return True


def _owned_by_job(plan: LaunchPlan) -> bool:
    """Whether the owner is of our job: nodes start at the same time, so it may be about to write that."""
    deadline = time.monotonic() + OWNER_SECONDS
    while _read_owner(plan)[1] != plan.job:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _read_owner(plan: LaunchPlan) -> tuple[str, str]:
    """Process and job that the lock's file names; read anew, as what other machines write reaches no open file."""
    owner, _, job = (plan.run_dir / LOCK_FILE).read_text().partition("\n")
    return owner, job
