"""Every way that an attempt can end, and what the job does then."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.slurm.verdict import AttemptOutcome, RequeueLimits, decide, suspects, to_exclude
from megatron_lite.errors import RunEnd
from megatron_lite.observe.markers import Marker

LIMITS = RequeueLimits(requeues=5, stalled=2)


def marker(end: RunEnd, message: str = "a file named STOP", step: int | None = 40) -> Marker:
    return Marker(end, step, message, 0.0)


PREEMPTED = AttemptOutcome(marker(RunEnd.PREEMPTED), 1, terminated=False, requeues=0, stalled=0, advanced=True)


def test_done_is_the_end() -> None:
    verdict = decide(replace(PREEMPTED, marker=marker(RunEnd.DONE, "")), LIMITS)
    assert (verdict.requeue, verdict.exit_code, verdict.reason) == (False, 0, "DONE at step 40")


def test_preempted_goes_back() -> None:
    verdict = decide(PREEMPTED, LIMITS)
    assert verdict.requeue
    assert verdict.reason == "PREEMPTED at step 40: a file named STOP; requeued, 1 of at most 5"


def test_full_disk_goes_back_while_there_is_progress() -> None:
    """Somebody makes room, or the quota is raised, and nothing of the run has to be changed."""
    full = replace(PREEMPTED, marker=marker(RunEnd.DISK_ERROR, "no space"))
    assert decide(full, LIMITS).requeue
    verdict = decide(replace(full, advanced=False, stalled=2), LIMITS)
    assert (verdict.requeue, verdict.exit_code) == (False, 85)


@pytest.mark.parametrize("end", [None, RunEnd.FAILED, RunEnd.CONFIG_ERROR, RunEnd.PREEMPTED])
def test_ranks_that_were_refused_the_folder_do_not_come_back(end: RunEnd | None) -> None:
    """The marker is that of the run which holds it."""
    used = replace(PREEMPTED, marker=None if end is None else marker(end), used_by="process 7 on n3")
    verdict = decide(used, LIMITS)
    assert (verdict.requeue, verdict.exit_code) == (False, 2)
    assert verdict.reason == "not requeued: the run folder is in use by process 7 on n3"


@pytest.mark.parametrize("end", [None, *RunEnd])
def test_a_job_that_slurm_ends_does_not_come_back_by_itself(end: RunEnd | None) -> None:
    verdict = decide(replace(PREEMPTED, marker=None if end is None else marker(end), terminated=True), LIMITS)
    assert not verdict.requeue
    assert verdict.exit_code == (0 if end is RunEnd.DONE else 143)


@pytest.mark.parametrize("end", [RunEnd.CONFIG_ERROR, RunEnd.DIVERGED, RunEnd.OUT_OF_DATA, RunEnd.OUT_OF_MEMORY])
def test_what_would_happen_again_is_the_end(end: RunEnd) -> None:
    verdict = decide(replace(PREEMPTED, marker=marker(end, "two\nlines")), LIMITS)
    assert (verdict.requeue, verdict.exit_code) == (False, int(end))
    assert verdict.reason == f"{end.name} at step 40: two lines; not requeued: another attempt would end the same way"


@pytest.mark.parametrize("end", [RunEnd.HUNG, RunEnd.FAILED, RunEnd.DEVICE_ERROR])
def test_what_may_be_the_machines_fault_goes_back(end: RunEnd) -> None:
    assert decide(replace(PREEMPTED, marker=marker(end)), LIMITS).requeue


@pytest.mark.parametrize(("code", "exit_code"), [(137, 137), (0, 1)])
def test_ranks_that_say_nothing(code: int, exit_code: int) -> None:
    verdict = decide(replace(PREEMPTED, marker=None, code=code, requeues=4), LIMITS)
    assert (verdict.requeue, verdict.exit_code) == (True, exit_code)
    assert verdict.reason == (
        f"the ranks ended without a word (srun ended with {code}): killed, or their node was lost; requeued, 5 of at "
        "most 5"
    )


def test_limit_of_requeues() -> None:
    verdict = decide(replace(PREEMPTED, requeues=5), LIMITS)
    assert (verdict.requeue, verdict.exit_code) == (False, 75)
    assert verdict.reason.endswith("; not requeued: launcher.max_requeues=5 is reached")


def test_restarts_without_progress() -> None:
    stalled = replace(PREEMPTED, marker=marker(RunEnd.FAILED, "ValueError", None), advanced=False, requeues=3)
    assert decide(replace(stalled, stalled=1), LIMITS).requeue
    verdict = decide(replace(stalled, stalled=2), LIMITS)
    assert (verdict.requeue, verdict.exit_code) == (False, 1)
    assert verdict.reason == (
        "FAILED: ValueError; not requeued: 3 attempts in a row have left no newer checkpoint "
        "(launcher.max_stalled_requeues=2)"
    )
    assert decide(replace(stalled, stalled=2, advanced=True), LIMITS).requeue


HANG = marker(RunEnd.HUNG, "rank 5 (node n2, tp1 pp0 dp2) has been in 'data' for 92 s")


@pytest.mark.parametrize(
    ("end", "reported", "lost", "expected"),
    [
        (HANG, None, [], []),
        (HANG, "n2", [], ["n2"]),
        (HANG, "n3.cluster.example", [], ["n3"]),
        (HANG, "n2", ["n1"], ["n1", "n2"]),
        (HANG, "another", [], []),
        (marker(RunEnd.PREEMPTED, "node n2"), "n2", [], []),
        (None, "n2", ["n3"], ["n3"]),
        (replace(marker(RunEnd.DEVICE_ERROR, "uncorrectable ECC error"), node="n2"), None, [], ["n2"]),
        (replace(marker(RunEnd.DEVICE_ERROR, "uncorrectable ECC error"), node="n2.site"), "n3", [], ["n2"]),
        (marker(RunEnd.FAILED, "illegal memory access"), "n2", [], []),
    ],
)
def test_suspects(end: Marker | None, reported: str | None, lost: list[str], expected: list[str]) -> None:
    assert suspects(end, reported, lost, ["n1", "n2", "n3"]) == expected


def test_nodes_are_excluded_while_enough_are_left() -> None:
    usable = ["n1", "n2", "n3", "n4"]
    assert to_exclude(["n2"], ["n9"], usable, 3) == (["n2", "n9"], None)
    assert to_exclude(["n2"], ["n1"], usable, 3) == (
        [],
        "n2 not excluded: of its partition's nodes 2 would be left, and the job needs 3",
    )
    assert to_exclude([], ["n1"], usable, 3) == ([], None)
