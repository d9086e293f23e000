"""Errors that a user can cause, and the exit code of each.

Every message names the dotted key (or the file), its value, the rule it breaks and the remedy. `assert` is for our own
invariants; anything that a wrong config, file or machine can trigger raises one of these errors instead.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import ClassVar

from megatron_lite.faults import Fault, fault_of, telling_line

EXIT_OK = 0
EXIT_FAILURE = 1  # a bug of ours: printed with its traceback
EXIT_INTERRUPTED = 130  # 128 + SIGINT
EXIT_USER_ERROR = 2  # a MegatronLiteError: printed as its message, without a traceback unless --debug


DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS})
"""Error codes of a full disk or quota, and of a disk that fails or is not reachable; no setting is wrong."""


class RunEnd(IntEnum):
    """How an attempt at a run ended: the exit code of its processes, and the name of the marker in its run folder."""

    DONE = EXIT_OK
    FAILED = EXIT_FAILURE
    CONFIG_ERROR = EXIT_USER_ERROR
    PREEMPTED = 75  # asked to stop; saved, and can go on (EX_TEMPFAIL of sysexits.h)
    DIVERGED = 81
    OUT_OF_DATA = 82
    OUT_OF_MEMORY = 83
    HUNG = 84
    DISK_ERROR = 85  # the disk is full, or fails
    DEVICE_ERROR = 86  # a GPU, its driver or its link failed


class MegatronLiteError(Exception):
    """Base class of all errors that the user can fix."""

    end: ClassVar[RunEnd] = RunEnd.CONFIG_ERROR


class ConfigError(MegatronLiteError):
    """One or more configuration values break a rule; `problems` lists every one of them."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        return type(self), (self.problems,)  # keep the list when crossing a process boundary


class DataError(MegatronLiteError):
    """A corpus, tokenizer or shard that cannot be used as it is."""


class OutOfDataError(DataError):
    """data.max_epochs passes over the data are done before train.steps."""

    end = RunEnd.OUT_OF_DATA


class CheckpointError(MegatronLiteError):
    """A checkpoint is missing, incomplete or does not fit this run."""


class DiskError(MegatronLiteError):
    """A disk is full or fails, and a necessary read or write cannot be postponed."""

    end = RunEnd.DISK_ERROR


class ForeignFormatError(CheckpointError):
    """A checkpoint of another version of megatron_lite: it may be intact, but this version cannot read it."""


class DamagedFileError(MegatronLiteError):
    """A state file is not what a run wrote: truncated, zeroed, changed, or from another program."""


class LaunchError(MegatronLiteError):
    """The processes of a run cannot be started, or not enough of them were."""


class RunFolderInUseError(LaunchError):
    """Another process holds the lock of the run folder."""


class RunFolderLostError(LaunchError):
    """Another process has taken over the lock of the run folder, so this one must not write to it any more."""


class TrainingError(MegatronLiteError):
    """Training cannot go on with these settings."""


class TrackingError(MegatronLiteError):
    """A view of the figures (wandb, TensorBoard, a plot) cannot be made; training goes on without it."""


class DivergedError(TrainingError):
    """Loss became NaN or Inf, or spikes did not end."""

    end = RunEnd.DIVERGED


class DeviceMemoryError(MegatronLiteError):
    """A rank ran out of memory."""

    end = RunEnd.OUT_OF_MEMORY


class DeviceFailedError(MegatronLiteError):
    """A GPU, its driver or its link failed; the run itself is not at fault.

    Args:
        node: where, by the scheduler's name.
    """

    end = RunEnd.DEVICE_ERROR

    def __init__(self, message: str, node: str) -> None:
        self.node = node
        super().__init__(message)

    def __reduce__(self) -> tuple[type[DeviceFailedError], tuple[str, str]]:
        return type(self), (str(self), self.node)  # keep the node when crossing a process boundary


class VerificationError(MegatronLiteError):
    """A parallel layout does not compute the same as a single rank."""


def end_of(error: BaseException) -> RunEnd:
    """How an attempt ends with an error. A disk error anywhere in the chain of causes decides."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DiskError) or (isinstance(cause, OSError) and cause.errno in DISK_ERRNOS):
            return RunEnd.DISK_ERROR
        cause = cause.__cause__
    return error.end if isinstance(error, MegatronLiteError) else RunEnd.FAILED


def disk_error(error: OSError) -> DiskError | None:
    """The error to show if the disk is the cause; None if it is not."""
    if error.errno not in DISK_ERRNOS:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return DiskError(
        f"the disk is full or fails ({where}{error.strerror}); free space on it or repair it: the same command then "
        "resumes from the newest complete checkpoint"
    )


def memory_error(error: BaseException) -> DeviceMemoryError | None:
    """The error to show for one that says that memory ran out; None if it does not, or if it is ours already."""
    if isinstance(error, MegatronLiteError) or fault_of(error) is not Fault.memory:
        return None
    said = telling_line(error)
    return DeviceMemoryError(f"memory ran out: {said}; end other programs here, or use a smaller batch or model")


@contextmanager
def library_edge(error: type[MegatronLiteError], what: str, remedy: str = "", lines: int = 1) -> Iterator[None]:
    """Turn any exception of a library into `error`: "<what>: <the library's first lines>; <remedy>".

    Libraries do not document all exceptions that they raise, so a list of types is always incomplete. Put only calls of
    the library into the block: an exception in our own code is a bug, and must keep its traceback. Our own errors
    (raised by a callback, say) pass unchanged; so does running out of memory, of the host or of a GPU. A panic of a
    Rust library counts as its error, too, although PyO3 derives it from BaseException.
    """
    try:
        yield
    except MegatronLiteError:
        raise
    except BaseException as problem:
        if fault_of(problem) is Fault.memory:
            raise
        if not isinstance(problem, Exception) and type(problem).__name__ != "PanicException":
            raise
        text = " ".join([line.strip() for line in str(problem).splitlines() if line.strip()][:lines])
        said = f"{type(problem).__name__}: {text}" if text else type(problem).__name__
        remedy = remedy_of(problem, remedy)
        raise error(f"{what}: {said}" + (f"; {remedy}" if remedy else "")) from problem


def remedy_of(problem: BaseException, otherwise: str) -> str:
    """The remedy if the machine has run out of a resource, whatever the library was doing; else `otherwise`."""
    cause: BaseException | None = problem
    seen: set[int] = set()  # a library may re-raise a cause, which makes the chain a cycle
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, OSError) and cause.errno in _REMEDIES:
            return _REMEDIES[cause.errno]
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return otherwise


_REMEDIES = {
    errno.EMFILE: "the process has reached its limit of open files; raise it, for example with `ulimit -n 4096`",
    errno.ENFILE: "this machine has reached its limit of open files; end other programs, or raise fs.file-max",
    errno.ENOMEM: "no memory is left, or too many files are mapped (vm.max_map_count); end other programs or raise it",
}
