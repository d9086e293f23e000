"""Who is named for a hang, from heartbeats alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_lite.observe.heartbeat import Beat, Phase
from megatron_lite.parallel.topology import Topology
from megatron_lite.train.hang.diagnosis import Finding, HangKind, find_culprit, ranks_text

NOW = 10_000.0
LIMIT = 90.0
TOPOLOGY = Topology(data_parallel_size=4, tensor_parallel_size=2, pipeline_parallel_size=2)
RANKS = range(16)


def beat(rank: int, phase: Phase, call: str | None = "all_reduce", **changes: Any) -> Beat:
    """Of a rank on one of two nodes of eight, in step 418 for 91 s and alive."""
    pipeline, data, tensor = TOPOLOGY.coordinates(rank)
    usual = Beat(
        rank=rank,
        node=f"n{rank // 8 + 1}",
        pid=100 + rank,
        pipeline=pipeline,
        data=data,
        tensor=tensor,
        phase=phase,
        micro_batch=None,
        step=418,
        position=7,
        seconds=90.5,
        call=call,
        where="train/loop.py:70 _step",
        time=NOW - 0.5,
    )
    return replace(usual, **changes)


def job(*special: Beat, phase: Phase = Phase.REDUCE, call: str | None = "all_reduce") -> dict[int, Beat]:
    """All ranks wait, but for those given."""
    return {rank: beat(rank, phase, call) for rank in RANKS} | {each.rank: each for each in special}


def find(beats: dict[int, Beat]) -> Finding:
    return find_culprit(beats, len(RANKS), now=NOW, limit_seconds=LIMIT, started=NOW - 5000)


def test_the_example_of_the_documentation() -> None:
    found = find(job(beat(5, Phase.DATA, call=None, seconds=91.5)))
    assert found.message == "rank 5 (node n1, tp1 pp0 dp2) has been in 'data' for 92 s; 15 others wait in step 418"
    assert (found.kind, found.ranks, found.node, found.phase, found.step) == (HangKind.BUSY, [5], "n1", "data", 418)
    assert found.seconds == 92.0


@pytest.mark.parametrize("phase", [Phase.DATA, Phase.SAVE, Phase.REPORT, Phase.BUILD, Phase.FINISH, Phase.LOAD])
def test_who_works_alone_while_others_wait(phase: Phase) -> None:
    assert find(job(beat(11, phase, call=None))).ranks == [11]


@pytest.mark.parametrize("phase", [Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER])
def test_who_computes_while_others_wait(phase: Phase) -> None:
    found = find(job(beat(11, phase, call=None, micro_batch=3)))
    assert found.message == (
        f"rank 11 (node n2, tp1 pp1 dp1) has been in '{phase} 3' for 91 s; 15 others wait in step 418"
    )


def test_a_rank_that_waits_within_a_save_is_a_victim() -> None:
    beats = job(beat(0, Phase.SAVE, call=None), phase=Phase.SAVE, call="barrier")
    assert find(beats).ranks == [0]


def test_a_barrier_at_which_all_ranks_wait_blames_none() -> None:
    found = find(job(phase=Phase.SAVE, call="barrier"))
    assert (found.kind, found.node) == (HangKind.BEHIND, None)
    assert found.message == (
        "all 16 ranks (nodes n1, n2) wait for each other in step 418 for 91 s: 16 in 'save' (barrier)"
    )


def test_a_stopped_rank_comes_before_one_that_works() -> None:
    found = find(job(beat(5, Phase.DATA, call=None), beat(9, Phase.REDUCE, time=NOW - 92)))
    assert found.message == ("rank 9 (node n2, tp1 pp1 dp0) has sent no heartbeat for 92 s; 15 others wait in step 418")
    assert (found.kind, found.node) == (HangKind.SILENT, "n2")


def test_a_dead_node_is_named_once() -> None:
    found = find(job(*(beat(rank, Phase.FORWARD, time=NOW - 120) for rank in range(8, 16))))
    assert found.message == "ranks 8-15 (node n2) have sent no heartbeat for 120 s; 8 others wait in step 418"
    assert found.node == "n2"


def test_silent_ranks_of_two_nodes_accuse_neither() -> None:
    assert find(job(beat(1, Phase.SEND, time=NOW - 99), beat(12, Phase.SEND, time=NOW - 99))).node is None


def test_a_delayed_heartbeat_is_no_silence() -> None:
    assert find(job(beat(3, Phase.REDUCE, time=NOW - LIMIT / 3), beat(5, Phase.DATA, call=None))).ranks == [5]


def test_a_rank_that_never_started() -> None:
    beats = job(phase=Phase.MEET, call="init_process_group")
    beats = {rank: replace(each, step=0) for rank, each in beats.items() if rank != 6}
    found = find(beats)
    assert found.message == "rank 6 has sent no heartbeat in this attempt; 15 others wait before the first step"
    assert (found.node, found.phase, found.step) == (None, None, 0)


def test_heartbeats_of_an_earlier_attempt_do_not_count() -> None:
    old = beat(6, Phase.DATA, call=None, time=NOW - 5001)
    assert find(job(old)).message.startswith("rank 6 has sent no heartbeat in this attempt")


def test_a_rank_that_has_ended_is_waited_for() -> None:
    found = find(job(beat(2, Phase.ENDED, call=None, time=NOW - 93)))
    assert found.message == "rank 2 (node n1, tp0 pp0 dp1) has ended; 15 others wait in step 418"


def test_someone_who_has_just_begun_to_work_is_not_accused() -> None:
    found = find(job(beat(4, Phase.DATA, call=None, seconds=0.01)))
    assert found.kind is HangKind.BEHIND
    found = find(job(beat(4, Phase.DATA, call=None, seconds=0.01), beat(5, Phase.FORWARD, call=None)))
    assert found.ranks == [5]


def test_work_without_collectives_comes_before_a_computation() -> None:
    """On a GPU collectives leave no trace on the stack, and all others seem to compute."""
    beats = job(beat(5, Phase.DATA, call=None, seconds=90.1), phase=Phase.BACKWARD, call=None)
    assert find(beats).ranks == [5]


def test_a_phase_that_waits_by_its_nature_is_no_work() -> None:
    beats = job(beat(5, Phase.BACKWARD, call=None, seconds=90.1), phase=Phase.RECEIVE, call=None)
    assert find(beats).ranks == [5]


def test_ranks_at_the_same_work_are_named_together_longest_first() -> None:
    found = find(job(*(beat(rank, Phase.DATA, call=None, seconds=80.0 + rank) for rank in (8, 9, 11))))
    assert found.ranks == [11, 9, 8]
    assert found.message == "ranks 8-9, 11 (node n2) have been in 'data' for 92 s; 13 others wait in step 418"


def test_all_ranks_at_the_same_work() -> None:
    found = find(job(phase=Phase.DATA, call=None))
    assert found.message == "all 16 ranks (nodes n1, n2) have been in 'data' for 91 s"
    assert (found.kind, found.step) == (HangKind.BUSY, 418)


def test_the_earliest_step_is_furthest_behind() -> None:
    found = find(job(beat(7, Phase.OPTIMIZER, call="all_gather", step=417)))
    assert found.message == (
        "rank 7 (node n1, tp1 pp0 dp3) is furthest behind: in 'optimizer' (all_gather) of step 417 for 91 s; "
        "15 others wait in step 418"
    )
    assert (found.kind, found.node) == (HangKind.BEHIND, None)


def test_a_stage_that_receives_is_a_victim() -> None:
    first_stage = [beat(rank, Phase.RECEIVE, call="recv") for rank in range(8)]
    later = [beat(rank, Phase.RECEIVE, call="recv") for rank in range(8, 16)]
    stuck = [beat(rank, Phase.FORWARD, micro_batch=2) for rank in (12, 13)]  # a tensor-parallel pair
    found = find(job(*first_stage, *later, *stuck))
    assert found.message == (
        "ranks 12-13 (node n2) are furthest behind in step 418 for 91 s: 2 in 'forward 2' (all_reduce); "
        "14 others wait in step 418"
    )


def test_among_ranks_of_a_stage_the_fewest_phases_are_furthest_behind() -> None:
    assert find(job(beat(3, Phase.REDUCE, position=6))).ranks == [3]
    # another stage enters other phases, so its number of them says nothing
    other_stage = [beat(rank, Phase.REDUCE, position=3) for rank in range(8, 16)]
    assert find(job(beat(3, Phase.REDUCE, position=6), *other_stage)).ranks == [3]


def test_stages_that_wait_for_each_other() -> None:
    first_stage = [beat(rank, Phase.RECEIVE, call="recv") for rank in range(8)]
    found = find(job(*first_stage, phase=Phase.SEND, call="send"))
    assert found.message == (
        "all 16 ranks (nodes n1, n2) wait for each other in step 418 for 91 s: "
        "8 in 'receive' (recv), 8 in 'send' (send)"
    )


def test_a_gpu_job_whose_ranks_all_seem_to_compute() -> None:
    behind = beat(3, Phase.BACKWARD, call=None, micro_batch=2, position=5)
    assert find(job(behind, phase=Phase.BACKWARD, call=None)).ranks == [3]


def test_a_world_of_one() -> None:
    alone = {0: beat(0, Phase.DATA, call=None)}
    found = find_culprit(alone, 1, now=NOW, limit_seconds=LIMIT, started=0.0)
    assert found.message == "rank 0 (node n1, tp0 pp0 dp0) has been in 'data' for 91 s"


def test_one_other_waits() -> None:
    beats = {0: beat(0, Phase.DATA, call=None), 1: beat(1, Phase.REDUCE)}
    message = find_culprit(beats, 2, now=NOW, limit_seconds=LIMIT, started=0.0).message
    assert message.endswith("; 1 other waits in step 418")


def test_no_rank_has_published_a_heartbeat() -> None:
    found = find_culprit({}, 2, now=NOW, limit_seconds=LIMIT, started=NOW - 91)
    assert found.message == "all 2 ranks have sent no heartbeat in this attempt"


@pytest.mark.parametrize(
    ("ranks", "text"), [([5], "rank 5"), ([0, 1, 2, 3, 7], "ranks 0-3, 7"), ([4, 2, 3], "ranks 2-4")]
)
def test_spelled(ranks: list[int], text: str) -> None:
    assert ranks_text(ranks) == text
