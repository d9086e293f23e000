"""Whether a job requeues itself or ends when its ranks have ended. Pure: no files, no Slurm."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megatron_lite.errors import EXIT_FAILURE, EXIT_USER_ERROR, RunEnd
from megatron_lite.observe.markers import Marker

NOTHING_LEFT = 100  # exit code of `attempt begin` for a run that is done; the job then ends with 0
EXIT_TERMINATED = 143  # 128 + SIGTERM
# A retry would end the same way; the user has to change something first.
FINAL = frozenset({RunEnd.CONFIG_ERROR, RunEnd.DIVERGED, RunEnd.OUT_OF_DATA, RunEnd.OUT_OF_MEMORY})


@dataclass(frozen=True)
class RequeueLimits:
    requeues: int
    """launcher.max_requeues."""
    stalled: int
    """launcher.max_stalled_requeues."""


@dataclass(frozen=True)
class AttemptOutcome:
    """How an attempt ended, and the job's history."""

    marker: Marker | None
    """None = the ranks were killed before they could write one."""
    code: int
    """Exit code of srun, used if there is no marker."""
    terminated: bool
    """Slurm is ending the job: it was cancelled, or Slurm itself requeues it."""
    requeues: int
    """How often this job has requeued itself."""
    stalled: int
    """The latest of these, in a row, that left no newer checkpoint."""
    advanced: bool
    """The newest checkpoint is not the one that this attempt began with."""
    used_by: str | None = None
    """Another holder of the run folder; the marker is then not ours."""


@dataclass(frozen=True)
class Verdict:
    requeue: bool
    exit_code: int
    """Exit code of the job if it is not requeued."""
    reason: str
    """One line."""


def decide(outcome: AttemptOutcome, limits: RequeueLimits) -> Verdict:
    """Decide whether the job is requeued."""
    marker = outcome.marker
    what, code = _told(marker, outcome.code)
    if marker is not None and marker.end is RunEnd.DONE:
        return Verdict(False, code, what)
    if outcome.used_by is not None:
        return Verdict(False, EXIT_USER_ERROR, f"not requeued: the run folder is in use by {outcome.used_by}")
    if outcome.terminated:
        return Verdict(False, EXIT_TERMINATED, f"{what}; not requeued from here: Slurm is ending the job itself")
    if marker is not None and marker.end in FINAL:
        return Verdict(False, code, f"{what}; not requeued: another attempt would end the same way")
    if outcome.requeues >= limits.requeues:
        return Verdict(False, code, f"{what}; not requeued: launcher.max_requeues={limits.requeues} is reached")
    if not outcome.advanced and outcome.stalled >= limits.stalled:
        return Verdict(
            False,
            code,
            f"{what}; not requeued: {outcome.stalled + 1} attempts in a row have left no newer checkpoint "
            f"(launcher.max_stalled_requeues={limits.stalled})",
        )
    return Verdict(True, code, f"{what}; requeued, {outcome.requeues + 1} of at most {limits.requeues}")


def _told(marker: Marker | None, code: int) -> tuple[str, int]:
    """What happened, in one line, and the exit code for it."""
    if marker is None:
        what = f"the ranks ended without a word (srun ended with {code}): killed, or their node was lost"
        return what, code or EXIT_FAILURE
    step = "" if marker.step is None else f" at step {marker.step}"
    message = " ".join(marker.message.split())
    return f"{marker.end.name}{step}" + (f": {message}" if message else ""), int(marker.end)


def suspects(marker: Marker | None, reported: str | None, lost: Collection[str], nodes: Collection[str]) -> list[str]:
    """The job's nodes that the next attempt should avoid.

    Args:
        reported: the node that the hang report names, which may be a full host name; None = it names none.
        lost: nodes that Slurm has lost.
        nodes: the job's nodes, by Slurm's names.
    """
    named = set(lost)
    accused = None
    if marker is not None:
        accused = reported if marker.end is RunEnd.HUNG else marker.node
    if accused is not None:
        named |= {accused, accused.partition(".")[0]}
    return [node for node in nodes if node in named]


def to_exclude(
    suspected: Collection[str], excluded: Collection[str], usable: Collection[str], needed: int
) -> tuple[list[str], str | None]:
    """All nodes to exclude from the requeued job, or none and the reason, if too few would be left.

    Args:
        suspected: suspects of this attempt.
        excluded: nodes excluded by earlier attempts.
        usable: nodes of the partition that are up.
        needed: number of nodes of the job.
    """
    if not suspected:
        return [], None
    names = ", ".join(suspected)
    left = set(usable) - set(suspected) - set(excluded)
    if len(left) < needed:
        return (
            [],
            f"{names} not excluded: of its partition's nodes {len(left)} would be left, and the job needs {needed}",
        )
    return sorted({*suspected, *excluded}), None
