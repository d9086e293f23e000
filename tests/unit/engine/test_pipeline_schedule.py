"""Schedules are pure: what they say can be looked at, and checked, without a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from deepspeed.runtime.pipe import schedule as deepspeed_schedules

from megatron_lite.engine.pipeline_schedule import (
    NUM_EVALUATION_BUFFERS,
    Action,
    Instruction,
    Tick,
    forward_only,
    num_training_buffers,
    one_forward_one_backward,
)

SIZES = [(stages, micro_batches) for stages in (1, 2, 3, 4, 6) for micro_batches in (1, 2, 3, 8)]
SCHEDULES = [one_forward_one_backward, forward_only]
Schedule = Callable[[int, int, int], Iterator[Tick]]
COMPUTE = {Action.FORWARD: "F", Action.BACKWARD: "B"}
MEETS = {Action.SEND: (Action.RECEIVE, +1), Action.SEND_GRAD: (Action.RECEIVE_GRAD, -1)}


def picture(schedule: Schedule, stages: int, micro_batches: int) -> list[str]:
    """A line a stage, a column a tick: which micro-batch it computes, forward or backward."""

    def cell(tick: Tick) -> str:
        return next((COMPUTE[one.action] + str(one.micro_batch) for one in tick if one.action in COMPUTE), ". ")

    return [" ".join(map(cell, schedule(stage, stages, micro_batches))).rstrip() for stage in range(stages)]


def test_one_forward_one_backward_as_a_picture() -> None:
    assert picture(one_forward_one_backward, 4, 8) == [
        "F0 .  F1 .  F2 .  F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 .  B5 .  B6 .  B7",
        ".  F0 .  F1 .  F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 .  B6 .  B7 .",
        ".  .  F0 .  F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 .  B7 .  .",
        ".  .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7 .  .  .",
    ]


def test_forward_only_as_a_picture() -> None:
    assert picture(forward_only, 3, 4) == ["F0 F1 F2 F3 .  .", ".  F0 F1 F2 F3 .", ".  .  F0 F1 F2 F3"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_each_send_meets_its_receive_in_the_same_tick(schedule: Schedule, stages: int, micro_batches: int) -> None:
    ticks = list(zip(*(schedule(stage, stages, micro_batches) for stage in range(stages)), strict=True))
    for tick in ticks:
        expected = {
            (stage + offset, receive, one.micro_batch)
            for stage, own in enumerate(tick)
            for one in own
            if one.action in MEETS
            for receive, offset in [MEETS[one.action]]
        }
        received = {
            (stage, one.action, one.micro_batch)
            for stage, own in enumerate(tick)
            for one in own
            if one.action in (Action.RECEIVE, Action.RECEIVE_GRAD)
        }
        assert received == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_blocking_sends_never_wait_for_each_other(schedule: Schedule, stages: int, micro_batches: int) -> None:
    """All stages executed side by side: a send ends when its receive begins, and the other way round."""
    queues = [[one for tick in schedule(stage, stages, micro_batches) for one in tick] for stage in range(stages)]
    while any(queues):
        before = sum(map(len, queues))
        for stage, queue in enumerate(queues):
            _advance(stage, queue, queues)
        assert sum(map(len, queues)) < before, f"stages wait for each other: {[queue[:1] for queue in queues]}"


def _advance(stage: int, queue: list[Instruction], queues: list[list[Instruction]]) -> None:
    """Execute what this stage can: all that needs no neighbour, and a send whose neighbour is at its receive."""
    while queue and queue[0].action not in (Action.RECEIVE, Action.RECEIVE_GRAD):
        one = queue[0]
        if one.action in MEETS:
            receive, offset = MEETS[one.action]
            other = queues[stage + offset]
            if not other or (other[0].action, other[0].micro_batch) != (receive, one.micro_batch):
                return
            other.pop(0)
        queue.pop(0)


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_no_buffer_is_written_while_it_is_in_use(stages: int, micro_batches: int) -> None:
    for stage in range(stages):
        in_use: dict[int, int] = {}
        for tick in one_forward_one_backward(stage, stages, micro_batches):
            for one in tick:
                assert one.buffer < num_training_buffers(stage, stages, micro_batches)
                if one.action is Action.FORWARD:
                    assert one.buffer not in in_use
                    in_use[one.buffer] = one.micro_batch
                elif one.action is Action.BACKWARD:
                    assert in_use.pop(one.buffer) == one.micro_batch
        assert not in_use


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_deepspeed_s_own_schedules_have_the_same_order(stages: int, micro_batches: int) -> None:
    """Its engine executes ours; so far nothing but the order of its own has been proven to work with its buffers."""
    names = {
        "LoadMicroBatch": Action.LOAD,
        "ForwardPass": Action.FORWARD,
        "BackwardPass": Action.BACKWARD,
        "SendActivation": Action.SEND,
        "RecvActivation": Action.RECEIVE,
        "SendGrad": Action.SEND_GRAD,
        "RecvGrad": Action.RECEIVE_GRAD,
    }
    for stage in range(stages):
        for ours, theirs in (
            (one_forward_one_backward, deepspeed_schedules.TrainSchedule(micro_batches, stages, stage)),
            (forward_only, deepspeed_schedules.InferenceSchedule(micro_batches, stages, stage)),
        ):
            expected = [
                [(names[type(one).__name__], one.buffer_id) for one in tick if type(one).__name__ in names]
                for tick in theirs
            ]
            found = [[(one.action, one.buffer) for one in tick] for tick in ours(stage, stages, micro_batches)]
            assert found == expected


def test_an_evaluation_needs_two_buffers() -> None:
    used = {one.buffer for tick in forward_only(1, 3, 5) for one in tick}
    assert used == set(range(NUM_EVALUATION_BUFFERS))
