"""Pipeline schedules: what one stage does with the micro-batches of a batch, as a sequence of instructions.

A schedule is a pure generator without tensors or processes; to add a schedule, write another generator. It yields
ticks, each a list of instructions. All stages have the same number of ticks, and a send and its matching receive are in
the same tick on both stages. Two things follow:

- Sends block until they are received. So of two neighbours that exchange tensors in a tick, one must send first and the
  other receive first; otherwise both wait forever.
- Between two ticks no message is in flight, so a collective of all ranks is safe there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Action(StrEnum):
    LOAD = "load"  # the micro-batch: inputs on the first stage, labels on the last
    RECEIVE = "receive"  # activations from the previous stage
    FORWARD = "forward"
    SEND = "send"  # activations to the next stage
    RECEIVE_GRAD = "receive_grad"  # gradient of what was sent, from the next stage
    BACKWARD = "backward"
    SEND_GRAD = "send_grad"  # gradient of what was received, to the previous stage


@dataclass(frozen=True)
class Instruction:
    action: Action
    micro_batch: int
    """0 = the first of the batch."""
    buffer: int
    """Index of the stage's buffer for the activations of this micro-batch."""


Tick = list[Instruction]


def one_forward_one_backward(stage: int, stages: int, micro_batches: int) -> Iterator[Tick]:
    """1F1B (PipeDream-Flush, arXiv 2006.09503): one stage's part of a training batch.

    Stage i runs the forward pass of micro-batch k in tick i + 2k, and its backward pass in tick 2 stages - 1 - i + 2k.
    So forward and backward passes alternate once the pipeline is full, and stage i holds the activations of at most
    stages - i micro-batches. The result of a tick is sent in the next tick.
    """
    first_backward = 2 * stages - 1 - stage
    buffers = num_training_buffers(stage, stages, micro_batches)

    def pass_at(tick: int, first: int) -> int | None:
        return _micro_batch((tick - first) // 2, micro_batches)

    for tick in range(2 * (micro_batches + stages - 1)):
        if (tick - stage) % 2 == 0:
            steps = _forward_tick(stage, stages, pass_at(tick, stage), pass_at(tick - 1, first_backward))
        else:
            steps = _backward_tick(stage, stages, pass_at(tick, first_backward), pass_at(tick - 1, stage))
        yield [Instruction(action, micro_batch, micro_batch % buffers) for action, micro_batch in steps]


def _forward_tick(stage: int, stages: int, forward: int | None, computed: int | None) -> Iterator[tuple[Action, int]]:
    """The previous stage is in a backward tick, where it receives before it sends. So here the send comes first.

    Args:
        computed: micro-batch whose backward pass ran in the previous tick.
    """
    if computed is not None and stage > 0:
        yield Action.SEND_GRAD, computed
    if forward is None:
        return
    if stage > 0:
        yield Action.RECEIVE, forward
    if stage in (0, stages - 1):
        yield Action.LOAD, forward
    yield Action.FORWARD, forward


def _backward_tick(stage: int, stages: int, backward: int | None, computed: int | None) -> Iterator[tuple[Action, int]]:
    """The next stage is in a forward tick, where it sends before it receives. So here the receive comes first.

    Args:
        computed: micro-batch whose forward pass ran in the previous tick.
    """
    is_last = stage == stages - 1
    if backward is not None and not is_last:
        yield Action.RECEIVE_GRAD, backward
    if computed is not None and not is_last:
        yield Action.SEND, computed
    if backward is not None:
        yield Action.BACKWARD, backward


def num_training_buffers(stage: int, stages: int, micro_batches: int) -> int:
    """Number of micro-batches whose activations a stage holds at once under 1F1B; at least two, because one arrives
    while the previous one is still in use."""
    return max(2, min(stages - stage, micro_batches))


NUM_EVALUATION_BUFFERS = 2


def forward_only(stage: int, stages: int, micro_batches: int) -> Iterator[Tick]:
    """One stage's part of an evaluation: stage i runs micro-batch k in tick i + k, and sends the result in the next."""
    is_first, is_last = stage == 0, stage == stages - 1

    def instruction(action: Action, micro_batch: int) -> Instruction:
        return Instruction(action, micro_batch, micro_batch % NUM_EVALUATION_BUFFERS)

    for tick in range(micro_batches + stages - 1):
        forward = _micro_batch(tick - stage, micro_batches)
        finished = _micro_batch(tick - 1 - stage, micro_batches)
        loads = [instruction(Action.LOAD, forward)] if forward is not None and (is_first or is_last) else []
        send = [instruction(Action.SEND, finished)] if finished is not None and not is_last else []
        receive = [instruction(Action.RECEIVE, forward)] if forward is not None and not is_first else []
        # Even stages send first, odd stages receive first, so two neighbours never wait for each other.
        exchange = [*send, *receive] if stage % 2 == 0 else [*receive, *send]
        compute = [instruction(Action.FORWARD, forward)] if forward is not None else []
        yield [*loads, *exchange, *compute]


def _micro_batch(index: int, micro_batches: int) -> int | None:
    """None = nothing to compute, because the pipeline is filling or draining."""
    return index if 0 <= index < micro_batches else None
